"""What goes into a graph and comes out of it: names, axes, and tensors to trace with."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from raytx.components import Exportable

BATCH, PAST, LENGTH = 2, 3, 4
"""Sizes traced with. Different from each other and from 1, which tracers would take for the same axis or a constant."""
NO_INPUTS = frozenset({"labels", "num_targets", "position_ids"})
"""Features that a single pass does not take: targets, and positions, which the model counts itself."""
KINDS = ("key", "value")

Axes = tuple[str, ...]
"""Names of a tensor's leading axes, all dynamic; the axes after them are fixed."""


@dataclass(frozen=True)
class Signature:
    """The inputs of one graph; its outputs are the logits and, where it keeps a cache, the cache grown by the input."""

    name: str
    """"with-past": one graph reads prompts (with an empty past) and appends tokens. "single-pass": no cache."""
    inputs: dict[str, torch.Tensor]
    """Plain inputs by name, each (batch, length)."""
    axes: dict[str, Axes]
    past: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Keys and values of each layer, each (batch, heads, past, width)."""

    @property
    def past_names(self) -> list[str]:
        return [f"past_key_values.{layer}.{kind}" for layer in range(len(self.past)) for kind in KINDS]

    @property
    def present_names(self) -> list[str]:
        return [f"present.{layer}.{kind}" for layer in range(len(self.past)) for kind in KINDS]


def signatures(exportable: Exportable) -> Iterator[Signature]:
    """Yield what could be exported, best first: a decoder that keeps its cache, then the bare forward pass."""
    module, samples = exportable.module, exportable.samples
    if generates(exportable) and (past := _past(module, samples)):
        yield _with_past(samples, past)
    yield _single_pass(module, samples)


def generates(exportable: Exportable) -> bool:
    return exportable.task.protocol == "openai"


def _with_past(samples: dict[str, Any], past: list[tuple[torch.Tensor, torch.Tensor]]) -> Signature:
    """Positions are an input, so that prompts of different lengths can be padded on the left and grown together."""
    mask = torch.ones(BATCH, PAST + LENGTH, dtype=torch.int64)
    mask[0, 0] = 0  # a mask of ones could be traced away
    return Signature(
        name="with-past",
        inputs={
            "input_ids": _tokens(samples["input_ids"], LENGTH),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, PAST:],
        },
        axes={
            "input_ids": ("batch", "length"),
            "attention_mask": ("batch", "total"),
            "position_ids": ("batch", "length"),
        },
        past=past,
    )


def _single_pass(module: Any, samples: dict[str, Any]) -> Signature:
    taken = inspect.signature(module.forward).parameters
    inputs = {key: _tokens(value, LENGTH) for key, value in samples.items() if key in taken and key not in NO_INPUTS}
    if "attention_mask" in taken:
        inputs["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.int64)
        inputs["attention_mask"][0, -1] = 0
    return Signature("single-pass", inputs, {name: ("batch", "length") for name in inputs})


def _past(module: Any, samples: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Run the module on a few tokens; return its cache's keys and values, or nothing where it keeps no plain cache."""
    if not {"past_key_values", "position_ids", "attention_mask"} <= set(inspect.signature(module.forward).parameters):
        return []
    ids, mask = _tokens(samples["input_ids"], PAST), torch.ones(BATCH, PAST, dtype=torch.int64)
    with torch.no_grad():
        # A cache made without the config grows without end in every layer; sliding windows are then the mask's work.
        output = module(input_ids=ids, attention_mask=mask, past_key_values=DynamicCache(), use_cache=True)
    cache = getattr(output, "past_key_values", None)
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in getattr(cache, "layers", [])]
    plain = all(isinstance(t, torch.Tensor) and t.dim() == 4 and t.shape[2] == PAST for pair in pairs for t in pair)
    return pairs if plain else []


def _tokens(values: np.ndarray, length: int) -> torch.Tensor:
    """Real values in the shape to trace with: (batch, length)."""
    return torch.from_numpy(np.resize(np.asarray(values, dtype=np.int64), (BATCH, length)))
