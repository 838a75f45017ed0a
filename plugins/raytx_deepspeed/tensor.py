"""Cut a structure's layers over tensor-parallel ranks.

DeepSpeed's own AutoTP cuts a whole model that every rank already holds, and not inside a PipelineModule; these layers
are cut on the meta device, before a number is read, and are the same under ZeRO and under a pipeline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from raytx.components import TensorPlan, TensorStyle

# ------------------------------------------------------------------------------------------------------ shares


@dataclass(frozen=True)
class Share:
    """How one rank's part of a parameter is taken from the whole, and how the parts of all ranks make it again."""

    rank: int
    size: int
    group: Any
    """The process group of the ranks that share the layer."""
    dim: int | None = None
    """The dimension that is cut; None where every rank holds the whole parameter."""
    blocks: int = 1
    """Equal blocks along `dim`, each cut by itself."""
    sums: bool = False
    """Whether each rank's gradient is a part of the whole one, and their sum is it."""

    def take(self, whole: np.ndarray) -> np.ndarray:
        """Return this rank's part, (..., length / size, ...) along `dim`."""
        if self.dim is None:
            return whole
        blocks = np.split(whole, self.blocks, axis=self.dim)
        return np.concatenate([np.split(b, self.size, axis=self.dim)[self.rank] for b in blocks], axis=self.dim)

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Return the whole made of every rank's part, in rank order."""
        if self.dim is None:
            return parts[0]
        cut = [np.split(part, self.blocks, axis=self.dim) for part in parts]
        return np.concatenate([of_rank[b] for b in range(self.blocks) for of_rank in cut], axis=self.dim)

    def length(self, whole: int) -> int:
        """Return how much of a dimension one rank has; raise ValueError where it cannot be cut."""
        if whole % (self.blocks * self.size):
            raise ValueError(f"{whole} cannot be cut into {self.blocks} blocks over {self.size} ranks")
        return whole // self.size


# --------------------------------------------------------------------------------------------------------- cut


def cut(module: nn.Module, plan: TensorPlan, *, rank: int, size: int, group: Any) -> dict[str, Share]:
    """Replace the layers a plan names by this rank's part of them, in place; return the shares by parameter name.

    The module is on the meta device, and every path and parameter name stays what it was. A vocabulary's head that is
    tied to an uncut embedding, or whose width does not divide, stays whole: it answers the same either way.
    """
    if size == 1:
        return {}
    shares: dict[str, Share] = {}
    tied = _tied(module)
    for name, style in plan.layers.items():
        layer = module.get_submodule(name)
        if style.gather and (any(p in tied for p in layer.parameters()) or _width(layer, style) % size):
            continue
        found = _cut_layer(module, name, layer, style, Share(rank, size, group, blocks=style.blocks))
        shares |= {f"{name}.{key}": share for key, share in found.items()}
    for name, attributes in plan.divided.items():
        _divide(module.get_submodule(name), attributes, size)
    return shares


def _tied(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that more than one name leads to."""
    uses = Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))
    return {parameter for parameter, count in uses.items() if count > 1}


def _divide(module: nn.Module, attributes: Sequence[str], size: int) -> None:
    for attribute in attributes:
        setattr(module, attribute, getattr(module, attribute) // size)


def _cut_layer(module: nn.Module, name: str, layer: nn.Module, style: TensorStyle, share: Share) -> dict[str, Share]:
    if style.kind == "shared":
        whole = Share(share.rank, share.size, share.group, sums=True)
        return {key: whole for key, _ in layer.named_parameters(recurse=False)}
    if style.kind == "heads":
        return {key: _shrink(layer, key, share, dim=-1) for key, _ in layer.named_parameters(recurse=False)}
    part = (ColumnLinear if style.kind == "column" else RowLinear)(layer, style, share)
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, part)
    return part.shares


def _width(layer: nn.Module, style: TensorStyle) -> int:
    return layer.weight.shape[1 if style.transposed else 0]


def _shrink(layer: nn.Module, key: str, share: Share, *, dim: int) -> Share:
    """Give a layer this rank's part, still on the meta device, of its parameter; return the share it has."""
    old = getattr(layer, key)
    share = Share(share.rank, share.size, share.group, dim=dim % old.ndim, blocks=share.blocks)
    shape = list(old.shape)
    shape[share.dim] = share.length(shape[share.dim])
    part = nn.Parameter(torch.empty(shape, dtype=old.dtype, device="meta"), requires_grad=old.requires_grad)
    part.__dict__.update(old.__dict__)
    part.tensor_model_parallel = True  # what DeepSpeed's norms read: each rank's part counts
    setattr(layer, key, part)
    return share


# ------------------------------------------------------------------------------------------------------ layers


class _Part(nn.Module):
    """This rank's part of a linear layer, whatever way round its weight lies."""

    def __init__(self, layer: nn.Module, style: TensorStyle, share: Share) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, getattr(layer, "bias", None)
        self.transposed, self.group, self.gather = style.transposed, share.group, style.gather
        self.shares = self._cut(share)
        width, depth = self.weight.shape[::-1] if style.transposed else self.weight.shape
        self.out_features, self.in_features = width, depth
        self.train(layer.training)

    def _cut(self, share: Share) -> dict[str, Share]:
        raise NotImplementedError

    def _linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(x, self.weight.t() if self.transposed else self.weight, bias)


class ColumnLinear(_Part):
    """Outputs are cut: (..., inputs) to (..., outputs / ranks), or to (..., outputs) where they are gathered."""

    def _cut(self, share: Share) -> dict[str, Share]:
        weight = _shrink(self, "weight", share, dim=1 if self.transposed else 0)
        return {"weight": weight} | ({} if self.bias is None else {"bias": _shrink(self, "bias", share, dim=0)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._linear(CopyIn.apply(x, self.group), self.bias)
        return GatherOut.apply(y, self.group) if self.gather else y


class RowLinear(_Part):
    """Inputs are cut: (..., inputs / ranks) to (..., outputs), summed over the ranks; the bias is added once."""

    def _cut(self, share: Share) -> dict[str, Share]:
        return {"weight": _shrink(self, "weight", share, dim=0 if self.transposed else 1)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = SumOut.apply(self._linear(x, None), self.group)
        return y if self.bias is None else y + self.bias


# ------------------------------------------------------------------------------------------------ communication


class CopyIn(torch.autograd.Function):
    """The input of layers that are cut: itself forward; backward, every rank has a part of its gradient."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        context.group = group
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return summed(gradient, context.group), None


class SumOut(torch.autograd.Function):
    """The output of layers that are cut: every rank has a part of it forward; its gradient is whole."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        return summed(x, group)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class GatherOut(torch.autograd.Function):
    """The outputs of all ranks side by side; backward, each takes the gradient of its own."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        context.group, context.width = group, x.shape[-1]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        first = dist.get_rank(context.group) * context.width
        return gradient[..., first : first + context.width].contiguous(), None


def summed(x: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the sum over a group, as a new tensor."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
