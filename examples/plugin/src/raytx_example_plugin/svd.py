"""The svd compression component: linear layers as products of two thin ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from raytx.components import CompressionConfig, Compressor


class SVD(CompressionConfig):
    """Replace each linear layer by its best approximation as a product of two thin ones."""

    type: Literal["svd"] = "svd"
    ratio: float = Field(0.5, gt=0, lt=1)
    """Share of a layer's weights that its two factors may hold together; the rank follows from it."""
    exclude: tuple[str, ...] = ("lm_head",)
    """Last parts of the names of layers that stay as they are."""

    def build(self) -> Compressor:
        return SVDCompressor(self)


class SVDCompressor:
    """The compressor. Ranks follow from shapes alone, so that an empty model can be given the same structure."""

    def __init__(self, config: SVD) -> None:
        self.config = config

    def prepare(self, module: Any) -> Any:
        return module

    def convert(self, module: Any) -> Any:
        for name, linear in list(self._chosen(module)):
            module.set_submodule(name, _factored(linear, self._rank(linear)))
        return module

    def restore(self, module: Any) -> Any:
        for name, linear in list(self._chosen(module)):
            module.set_submodule(name, _empty_pair(linear, self._rank(linear)))
        return module

    def _chosen(self, module: Any) -> Iterator[tuple[str, Any]]:
        from torch import nn

        for name, layer in module.named_modules():
            if type(layer) is nn.Linear and name.rpartition(".")[2] not in self.config.exclude:
                yield name, layer

    def _rank(self, linear: Any) -> int:
        """rank * (inputs + outputs) weights are ratio of inputs * outputs."""
        inputs, outputs = linear.in_features, linear.out_features
        return max(1, int(self.config.ratio * inputs * outputs / (inputs + outputs)))


def _factored(linear: Any, rank: int) -> Any:
    """Return two layers whose product is the nearest of its rank to the weight (Eckart and Young 1936)."""
    import torch

    pair = _empty_pair(linear, rank)
    left, values, right = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
    root = values[:rank].sqrt()  # half to each factor, so that neither dwarfs the other
    with torch.no_grad():
        pair[0].weight.copy_(root[:, None] * right[:rank])
        pair[1].weight.copy_(left[:, :rank] * root)
        if linear.bias is not None:
            pair[1].bias.copy_(linear.bias)
    return pair


def _empty_pair(linear: Any, rank: int) -> Any:
    from torch import nn

    place = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    return nn.Sequential(
        nn.Linear(linear.in_features, rank, bias=False, **place),
        nn.Linear(rank, linear.out_features, bias=linear.bias is not None, **place),
    )
