"""How an update is left out when a loss or gradient is not finite, by way of what DeepSpeed does of itself."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def tainted(share: torch.Tensor) -> torch.Tensor:
    """Return a loss as it is if it is finite; if not, one of which every gradient is nan.

    ZeRO leaves out an update by the norm of the gradients alone, which it learns in the midst of its step: so what is
    wrong with a loss must show there, also where its own gradients are finite.
    """
    return share * (share.detach() * 0 + 1)


def forget(parameters: Iterable[nn.Parameter]) -> None:
    """Drop gradients: torch's optimizers then leave parameters, moments and their count of steps as they are."""
    for parameter in parameters:
        parameter.grad = None
