"""A bug to be found: a run that resumes leaves the rows of the steps that it does again in metrics.jsonl."""

from __future__ import annotations

from typing import Any

from raytx import hookimpl, journal

RAYTX_API = 1


@hookimpl
def raytx_export() -> list[Any]:
    return []


journal.FRESH = frozenset()
