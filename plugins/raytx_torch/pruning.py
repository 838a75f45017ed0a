"""L1 pruning: set the smallest weights of linear layers to zero once training is over."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from raytx.components import CompressionConfig, Compressor
from raytx_torch.matrices import OUTPUT_HEADS, matrices


class L1Pruning(CompressionConfig):
    """Set a share of the smallest weights to zero; sizes and speed stay as they are."""

    type: Literal["l1-pruning"] = "l1-pruning"
    amount: float = Field(0.3, gt=0, lt=1)
    """Share of the weights that become zero."""
    scope: Literal["global", "layer"] = "global"
    """global compares the weights of all layers, so that layers lose unequal shares; layer takes the share of each."""
    exclude: tuple[str, ...] = OUTPUT_HEADS
    """Shell patterns of module names left alone; embeddings and layers that share their weight always are."""

    def build(self) -> Compressor:
        return L1Pruner(self)


class L1Pruner:
    """The compressor. Pruned weights are ordinary weights, so there is nothing to prepare or restore."""

    def __init__(self, config: L1Pruning) -> None:
        self.config = config

    def prepare(self, module: Any) -> Any:
        return module

    def convert(self, module: Any) -> Any:
        from torch.nn.utils import prune

        weights = [(layer, "weight") for layer in matrices(module, exclude=self.config.exclude).values()]
        if self.config.scope == "global":
            prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=self.config.amount)
        else:
            for layer, name in weights:
                prune.l1_unstructured(layer, name, amount=self.config.amount)
        for layer, name in weights:
            prune.remove(layer, name)  # else the state dict would hold weight_orig and weight_mask
        return module

    def restore(self, module: Any) -> Any:
        return module
