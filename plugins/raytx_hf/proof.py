"""Prove on a small copy that a model cut into pieces computes what the whole one does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from raytx_hf.miniature import likeness
from raytx_hf.pieces import INSTEAD, pieces_of, plain

TOLERANCE = 1e-5
"""Of logits, loss and gradients, relative to the largest; fp32."""
FLOOR = 1e-3
TRAVELLING = ("attention_mask", "position_ids")
Features = dict[str, torch.Tensor | None]
IDS = [[3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16, 17, 18]]
POSITIONS = [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 1, 2]]
MASK = [[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]]


def flaw(module: nn.Module, travelling: Sequence[str] = TRAVELLING) -> str:
    """Return what pieces of a structure would compute otherwise than the whole, as a clause about "it"; "" if nothing.

    Logits, loss and every gradient are compared. Between the pieces the tuples are plain, as if each were a stage.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            small = likeness(plain(module))
            trials = [(_whole(small, given), _parts(small, given)) for given in _trials(travelling)]
    except Exception as error:  # the architecture's own code, run in a way its authors may not have tried
        why = " ".join(str(error).split())[:300]
        return f"a small copy of it could not be tried in pieces ({type(error).__name__}: {why}); {INSTEAD}"
    for what, difference in chain(*(_differences(whole, parts) for whole, parts in trials)):
        if not difference <= TOLERANCE:
            return f"its {what} would differ by {difference:.0e} from the whole model's; {INSTEAD}"
    return ""


def _trials(travelling: Sequence[str]) -> list[Features]:
    """Return the features of each trial: packed samples come with positions, padded ones with a mask."""
    known = dict(zip(TRAVELLING, (torch.tensor(MASK), torch.tensor(POSITIONS)), strict=True))
    return [{name: known[name] if name == given else None for name in travelling} for given in travelling] or [{}]


def _whole(module: Any, features: Features) -> dict[str, torch.Tensor]:
    """Return the model's own loss, its logits and all gradients."""
    ids = torch.tensor(IDS)
    output = module(input_ids=ids, labels=ids, use_cache=False, **features)
    return _measured(module, output.logits, output.loss)


def _parts(module: Any, features: Features) -> dict[str, torch.Tensor]:
    """Return the same of its pieces, with the loss that a pipeline's last stage takes."""
    ids = torch.tensor(IDS)
    travel: Any = (ids, *features.values())
    for piece in pieces_of(module, tuple(features)):
        travel = piece.module(tuple(travel) if isinstance(travel, tuple) else travel)
    return _measured(module, travel, functional.cross_entropy(travel[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def _measured(module: nn.Module, logits: torch.Tensor, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    gradients = {f"gradients of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "losses": loss.detach(), **gradients}


def _differences(whole: dict[str, torch.Tensor], parts: dict[str, torch.Tensor]) -> Iterator[tuple[str, float]]:
    """Yield each value's largest difference, relative to its largest number; a gradient that is nothing but rounding,
    as a key's bias has, is seen beside the others."""
    least = FLOOR * max(float(value.abs().max()) for value in whole.values())
    for what, value in whole.items():
        difference = float((value - parts[what]).abs().max()) if what in parts else float("inf")
        yield what, difference / max(float(value.abs().max()), least)
