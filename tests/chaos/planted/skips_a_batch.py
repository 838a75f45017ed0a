"""A bug to be found: a run that resumes goes on one batch too far in its data."""

from __future__ import annotations

from typing import Any

from raytx import hookimpl, worker
from raytx.batches import Batches

RAYTX_API = 1
restore, indices = worker.restore, Batches.indices


@hookimpl
def raytx_export() -> list[Any]:
    return []


def planted(*args: Any, **options: Any) -> Any:
    state = restore(*args, **options)
    if state.step:
        Batches.indices = lambda self, step: indices(self, step + 1)  # type: ignore[method-assign]
    return state


worker.restore = planted
