"""Strategies of torch alone: one process, distributed data parallel, fully sharded data parallel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from raytx.components import Shares, StrategyConfig
from raytx.errors import RecipeError
from raytx.layout import Layout
from raytx.optimizer import uncuttable

if TYPE_CHECKING:
    from raytx.recipe import Recipe


class Single(StrategyConfig):
    """One process without sharding: the reference that every other strategy must agree with."""

    type: Literal["single"] = "single"

    def layout(self, world_size: int) -> Layout:
        if world_size != 1:
            raise RecipeError(
                f"strategy.type=single runs on 1 worker, scaling.num_workers is {world_size}; use ddp, fsdp or "
                "deepspeed"
            )
        return Layout()

    def build(self) -> Any:
        from raytx_torch.whole import WholeStrategy

        return WholeStrategy()


class DDP(StrategyConfig):
    """Distributed data parallel: every rank holds the whole model, gradients are averaged while they are computed."""

    type: Literal["ddp"] = "ddp"
    bucket_cap_mb: float = Field(25, gt=0)
    """Megabytes of gradients sent at a time."""
    find_unused_parameters: bool = False
    """Search each pass for parameters without gradient; needed only by models that skip layers."""

    def build(self) -> Any:
        from raytx_torch.whole import WholeStrategy

        return WholeStrategy(bucket_cap_mb=self.bucket_cap_mb, find_unused_parameters=self.find_unused_parameters)


class FSDP(StrategyConfig):
    """Fully sharded data parallel (FSDP2): ranks share parameters, gradients and optimizer state, gathered by layer."""

    type: Literal["fsdp"] = "fsdp"
    replicas: int = Field(1, gt=0)
    """Groups of ranks that hold the whole model together; more than 1 (hybrid sharding) keeps gathering within a
    group, best a node, and only averages gradients between groups."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory and update them there; a layer at a time is copied
    to the GPU. Slower, and room for models that do not fit."""
    reshard_after_forward: bool = True
    """Free each layer after its forward pass and gather it again for backward; false sends a third less and keeps every
    layer whole until then."""
    reduce_each_microbatch: bool = False
    """Divide gradients over ranks after every microbatch, not once a step: with accumulation a rank then holds its
    share of them instead of all, and sends more."""
    find_unused_parameters: bool = False
    """Count parameters without gradient as having a zero one; needed only by models whose ranks may use different
    layers or experts in a pass."""

    def layout(self, world_size: int) -> Layout:
        if world_size % self.replicas:
            able = ", ".join(str(count) for count in range(1, world_size + 1) if world_size % count == 0)
            raise RecipeError(
                f"strategy.replicas={self.replicas} does not divide scaling.num_workers={world_size}; use one of {able}"
            )
        return Layout(data_parallel_size=world_size)

    def refusal(self, recipe: Recipe) -> str | None:
        return uncuttable(recipe.optim)

    def shares(self, layout: Layout) -> Shares:
        ranks = layout.data_parallel_size // self.replicas
        return Shares(parameters=ranks, gradients=ranks if self.reduce_each_microbatch else 1, optimizer=ranks)

    def build(self) -> Any:
        from raytx_torch.fsdp import FSDPStrategy

        return FSDPStrategy(self)
