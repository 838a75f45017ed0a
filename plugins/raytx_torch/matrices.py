"""Which weight matrices a compressor may change: linear layers that are neither excluded nor tied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from raytx.errors import RecipeError

OUTPUT_HEADS = ("lm_head", "embed_out", "score", "classifier*", "qa_outputs")
"""Names of the layers that make logits; an error there is not averaged out by a layer after it."""


def matrices(module: Any, *, exclude: Sequence[str]) -> dict[str, Any]:
    """Return the linear layers (nn.Linear and GPT-2's Conv1D) by qualified name; raise RecipeError when none is left.

    A pattern excludes a layer when it matches its qualified name or that of a module around it. A layer whose weight
    another one shares (an output head tied to the embedding) always stays as it is.
    """
    owners = Counter(id(weight) for _, weight in module.named_parameters(remove_duplicate=False))
    found = {
        name: layer
        for name, layer in module.named_modules()
        if _is_linear(layer) and owners[id(layer.weight)] == 1 and not _excluded(name, exclude)
    }
    if not found:
        raise RecipeError(
            f"this model has no linear layer to compress outside of exclude: {', '.join(exclude) or 'none'}"
        )
    return found


def _is_linear(layer: Any) -> bool:
    """Exactly these types: subclasses may use their weight in other ways than their forward."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return type(layer) in (nn.Linear, Conv1D)


def _excluded(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(outer, pattern) for outer in _nesting(name) for pattern in patterns)


def _nesting(name: str) -> Iterator[str]:
    """Yield "a.b.c", "a.b", "a": a layer is excluded with what it is part of."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(len(parts), 0, -1))
