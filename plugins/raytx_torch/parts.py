"""A tensor, and this rank's part of it: all of it, or a DTensor's shard along the first dimension."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part; it shares the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor, on the device that its ranks communicate from. Collective."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh  # which has no way to gather what is offloaded to another device
    near = tensor.to_local().to(mesh.device_type)
    return DTensor.from_local(
        near, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    ).full_tensor()


def part_of(value: torch.Tensor, *, like: torch.Tensor) -> torch.Tensor:
    """Return the slice of a whole tensor that this rank holds of one like it."""
    if not isinstance(like, DTensor):
        return value
    mesh = like.device_mesh
    length = -(-value.shape[0] // mesh.size(-1))  # of every shard but the last ones, which may be shorter or empty
    start = min(mesh.get_local_rank(mesh.ndim - 1) * length, value.shape[0])
    return value[start : start + length]


def filled(meta: torch.Tensor, value: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return this rank's part, on a device, of what a meta tensor stands for; attributes are kept."""
    whole_value = torch.from_numpy(np.asarray(value))
    assert whole_value.shape == meta.shape, (whole_value.shape, meta.shape)
    made = torch.empty_like(meta, device=device, dtype=whole_value.dtype, requires_grad=False)
    local(made).copy_(part_of(whole_value, like=meta))
    if isinstance(meta, nn.Parameter):
        made = nn.Parameter(made, requires_grad=meta.requires_grad)
    made.__dict__.update(vars(meta))
    return made
