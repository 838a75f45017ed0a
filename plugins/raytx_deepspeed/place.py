"""Give a structure's tensors a place in memory and this rank's part of their values, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from raytx.components import Weights
from raytx.place import place
from raytx_deepspeed.tensor import Share, summed


def materialise(
    module: nn.Module,
    weights: Weights,
    device: torch.device,
    *,
    shares: Mapping[str, Share],
    names: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    placed: Callable[[nn.Parameter], None] = lambda parameter: None,
) -> None:
    """Replace every meta parameter and buffer by this rank's part of its value, in place.

    Tied parameters stay one, and all keep their attributes and whether they train. `names` maps names in the module to
    those that weights and shares go by; `dtype` is of floating-point parameters, where it is not the structure's.
    `placed` is called with each parameter as soon as it has its value, so that it can be sharded before the next is
    read.
    """

    def made(local: str, old: torch.Tensor) -> torch.Tensor:
        if not old.is_meta:
            return old
        name = local if names is None else names[local]
        share = shares.get(name)
        if not isinstance(old, nn.Parameter):
            return _value(old, weights(name), device, share, old.dtype)
        kind = dtype if dtype is not None and old.is_floating_point() else old.dtype
        parameter = nn.Parameter(_value(old, weights(name), device, share, kind), requires_grad=old.requires_grad)
        parameter.__dict__.update(vars(old))
        if share is not None and share.sums and parameter.requires_grad:
            parameter.register_hook(lambda gradient: summed(gradient, share.group))
        placed(parameter)
        return parameter

    place(module, made)


def _value(
    old: torch.Tensor, whole: np.ndarray, device: torch.device, share: Share | None, dtype: torch.dtype
) -> torch.Tensor:
    part = whole if share is None else share.take(whole)
    value = torch.from_numpy(np.array(part, order="C")).to(device=device, dtype=dtype)
    if value.shape != old.shape:
        raise ValueError(f"a value of {tuple(value.shape)} was given for a place of {tuple(old.shape)}")
    return value
