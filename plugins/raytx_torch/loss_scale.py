"""The loss scale of fp16: as high as gradients bear, halved when they overflow (Micikevicius et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Mapping

START, FACTOR, INTERVAL = 2.0**16, 2.0, 2000
"""torch.amp.GradScaler's: where it starts, what it grows and shrinks by, and clean steps before it grows."""
LEAST = 2.0**-14
"""Gradients that still overflow at this scale are no matter of the number format."""


class LossScale:
    """A power of two, so that scaling rounds nothing. Ranks agree because they judge by one and the same norm."""

    def __init__(self) -> None:
        self.value, self.clean, self.skipped = START, 0, 0

    def judge(self, norm: float) -> dict[str, float]:
        """Take a step's gradient norm; return the scale it was made with and whether the step must be skipped."""
        told = {"loss_scale": self.value, "skipped": 0.0}
        if math.isfinite(norm):
            self._grow()
        elif self.value > LEAST:
            self.value, self.clean, self.skipped = self.value / FACTOR, 0, self.skipped + 1
            told["skipped"] = 1.0
        return told

    def _grow(self) -> None:
        self.clean += 1
        if self.clean == INTERVAL:
            self.value, self.clean = self.value * FACTOR, 0

    def scalars(self) -> dict[str, float]:
        return {"loss_scale": self.value, "clean_steps": self.clean, "skipped_steps": self.skipped}

    def load(self, scalars: Mapping[str, float]) -> None:
        """Take up what `scalars` returned."""
        self.value = scalars["loss_scale"]
        self.clean, self.skipped = int(scalars["clean_steps"]), int(scalars["skipped_steps"])
