"""The loss scale of fp16, which DeepSpeed keeps, made to mean what it means under every strategy.

DeepSpeed takes whatever is not finite for an overflow of the number format, halves the scale, and ends the run with an
error where it cannot sink below 1. Here a loss that is not finite is no matter of the scale, and gradients that are not
finite at the least scale are none either: such a step is left out, and whoever trains counts it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LEAST = 2.0**-14
"""Gradients that still overflow at this scale are no matter of the number format."""


class LossScale:
    """The scale of one DeepSpeed engine: ranks agree on it, as DeepSpeed judges by what they have reduced."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._scaler = engine, engine.optimizer.loss_scaler
        self._scaler.min_scale, self._scaler.raise_error_at_min_scale = LEAST, False
        self._before = self.scalars()

    @property
    def skipped(self) -> int:
        """Steps that updated nothing because they overflowed."""
        return int(self._engine.skipped_steps)

    def outcome(self, loss: float, norm: float) -> dict[str, float]:
        """Return what the row of a step that has just been done tells of it."""
        if not self._engine.optimizer.overflow:
            told = {"loss": loss, "grad_norm": norm, "skipped": 0.0}
        elif math.isfinite(loss) and self._before["loss_scale"] > LEAST:
            told = {"loss": loss, "grad_norm": 0.0, "skipped": 1.0}
        else:
            self.load(self._before)
            told = {"loss": loss, "grad_norm": math.nan, "skipped": 0.0}
        self._before = self.scalars()
        return told | {"loss_scale": self._before["loss_scale"]}

    def scalars(self) -> dict[str, float]:
        """Return the scale, the steps since it last changed for the worse, and those skipped in all."""
        clean = self._scaler.cur_iter - self._scaler.last_overflow_iter - 1
        return {
            "loss_scale": float(self._scaler.cur_scale),
            "clean_steps": float(clean),
            "skipped_steps": float(self._engine.skipped_steps),
        }

    def load(self, scalars: Mapping[str, float]) -> None:
        """Take up what `scalars` returned."""
        self._scaler.cur_scale = scalars["loss_scale"]
        self._scaler.cur_iter, self._scaler.last_overflow_iter = int(scalars["clean_steps"]), -1
        self._engine.skipped_steps = int(scalars["skipped_steps"])
        self._before = self.scalars()
