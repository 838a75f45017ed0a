"""A bug to be found: a checkpoint's weights are read, and its optimizer state is not."""

from __future__ import annotations

from typing import Any

import numpy as np

from raytx import checkpoint, hookimpl

RAYTX_API = 1
read = checkpoint.Checkpoint.read


@hookimpl
def raytx_export() -> list[Any]:
    return []


def planted(self: checkpoint.Checkpoint, name: str, part: Any) -> np.ndarray:
    found = read(self, name, part)
    return found if part == "weight" else np.zeros_like(found)


checkpoint.Checkpoint.read = planted  # type: ignore[method-assign]
