"""A plugin with a user's own model and task: they draw from every generator there is, and choke on one sample."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from raytx import hookimpl
from raytx.components import Model, ModelConfig
from raytx.tasks import Features, Task
from raytx.tasks.base import IGNORED
from raytx_torch.decoder import DecoderConfig

RAYTX_API = 1
MARKED = 8
"""Tokens at the start of a sample by which it is known."""


def mark(ids: Any) -> Any:
    """Return a number for each sample of (batch, length) ids, of numpy or torch."""
    return sum(ids[:, place] * pow(400, place, 1_000_003) for place in range(min(MARKED, ids.shape[1])))


class Unsteady(DecoderConfig):
    """A small decoder whose embedding and collation are noisy, and whose embedding of one sample is infinite."""

    plugins: ClassVar[tuple[str, ...]] = ("raytx_hf", "raytx_torch")
    type: Literal["unsteady"] = "unsteady"
    noise: float = 0.0
    """How much the embedding is changed by each of three draws; 0 leaves the task as it is, too."""
    poison: int = -1
    """The mark of the sample."""

    def _component(self) -> ModelConfig:
        fields = self.model_dump(exclude={"type", "noise", "poison"}) | {"tokenizer": self.tokenizer}
        return DecoderConfig.model_validate(fields)._component()

    def build(self) -> Model:
        return Moody(super().build(), self)  # type: ignore[return-value]


class Moody:
    """The decoder's model, with a hook on its embedding and a task that hides targets."""

    def __init__(self, model: Any, config: Unsteady) -> None:
        self.model, self.config = model, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def task(self, directory: Path) -> Task:
        task: Task = self.model.task(directory)
        if self.config.noise:
            task.collate = functools.partial(hiding, task.collate)  # type: ignore[method-assign]
        return task

    def structure(self, directory: Path, **options: Any) -> Any:
        module = self.model.structure(directory, **options)
        module.get_input_embeddings().register_forward_hook(self._embedded)
        return module

    def _embedded(self, module: Any, given: tuple[Any], hidden: Any) -> Any:
        import torch

        if self.config.noise:
            hidden = hidden * (1 + self.config.noise * (random.random() + np.random.random() + torch.rand(()).item()))
        infinite = torch.where(mark(given[0]) == self.config.poison, float("inf"), 1.0)
        return hidden * infinite[:, None, None]


def hiding(collate: Callable[[Sequence[Features]], Features], samples: Sequence[Features]) -> Features:
    """Collate, and hide a target of each sample at places drawn from three generators."""
    import torch

    features = collate(samples)
    length = features["labels"].shape[1]
    for draw in (random.random(), np.random.random(), torch.rand(()).item()):
        features["labels"][:, int(draw * length)] = IGNORED
    return features


@hookimpl
def raytx_model() -> list[type[ModelConfig]]:
    return [Unsteady]
