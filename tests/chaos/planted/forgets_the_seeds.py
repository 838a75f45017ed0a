"""A bug to be found: a run that resumes draws other random numbers for dropout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raytx import hookimpl, worker
from raytx.batches import Batches

RAYTX_API = 1
restore, microbatches = worker.restore, Batches.microbatches


@hookimpl
def raytx_export() -> list[Any]:
    return []


def other_seeds(self: Batches, step: int) -> list[Any]:
    return [replace(microbatch, seed=microbatch.seed ^ 1) for microbatch in microbatches(self, step)]


def planted(*args: Any, **options: Any) -> Any:
    state = restore(*args, **options)
    if state.step:
        Batches.microbatches = other_seeds  # type: ignore[method-assign]
    return state


worker.restore = planted
