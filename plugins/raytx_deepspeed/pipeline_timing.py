"""How long each piece of a model takes, measured on one copy of the model before it is staged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from raytx.components import Piece
from raytx_deepspeed.pipeline_module import TRAVELLING

RUNS = 4
"""Passes of each piece; the fastest counts, and the first warms up."""
Fill = Callable[[nn.Module, Mapping[str, str]], None]


def costs(pieces: Sequence[Piece], fill: Fill, shape: tuple[int, int], device: torch.device) -> list[float]:
    """Return the seconds of one forward and backward pass of each piece, for ids of a shape (batch, length).

    Pieces of equal shapes cost the same, so one of each is measured; no more than one is in memory at a time.
    Tensor-parallel ranks do this together.
    """
    known: dict[Any, float] = {}
    travel: Any = (torch.zeros(shape, dtype=torch.int64, device=device), *_features(shape, device))
    for piece in pieces:
        kind = _kind(piece)
        if kind not in known:
            with _lent(piece.module):
                fill(piece.module, piece.names)
                known[kind], travel = _timed(piece.module, travel)
    return [known[_kind(piece)] for piece in pieces]


def _features(shape: tuple[int, int], device: torch.device) -> tuple[torch.Tensor | None, ...]:
    positions = torch.arange(shape[1], device=device).expand(shape)
    return tuple({"position_ids": positions}.get(name) for name in TRAVELLING)


def _kind(piece: Piece) -> Any:
    return (type(piece.module), *((name, tuple(p.shape)) for name, p in piece.module.named_parameters()))


def _timed(module: nn.Module, travel: Any) -> tuple[float, Any]:
    """Return the seconds of the fastest pass, and what the piece makes of what it was given."""
    best = float("inf")
    hidden, *features = travel
    hidden = hidden.detach().requires_grad_(hidden.is_floating_point())
    for _ in range(RUNS):
        started = _now(hidden.device)
        made = module((hidden, *features))
        output = made[0] if isinstance(made, tuple) else made
        if output.requires_grad:
            output.backward(torch.zeros_like(output))
        best = min(best, _now(hidden.device) - started)
    return best, (output.detach(), *features)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _lent(module: nn.Module) -> Iterator[None]:
    """Give a module back its meta tensors afterwards."""
    before = [(part, dict(part._parameters), dict(part._buffers)) for part in module.modules()]
    try:
        yield
    finally:
        for part, parameters, buffers in before:
            part._parameters.update(parameters)
            part._buffers.update(buffers)
