"""Strategies of torch alone: one process, and distributed data parallel."""

from __future__ import annotations

from typing import Any, Literal

from raytx.components import StrategyConfig
from raytx.errors import RecipeError
from raytx.layout import Layout


class Single(StrategyConfig):
    """One process without sharding: the reference that every other strategy must agree with."""

    type: Literal["single"] = "single"

    def layout(self, world_size: int) -> Layout:
        if world_size != 1:
            raise RecipeError(
                f"strategy.type=single runs on 1 worker, scaling.num_workers is {world_size}; use ddp or deepspeed"
            )
        return Layout()

    def build(self) -> Any:
        from raytx_torch.engine import TorchStrategy

        return TorchStrategy(distributed=False)


class DDP(StrategyConfig):
    """Distributed data parallel: every rank holds the whole model, gradients are averaged while they are computed."""

    type: Literal["ddp"] = "ddp"
    bucket_cap_mb: float = 25
    """Megabytes of gradients sent at a time."""
    find_unused_parameters: bool = False
    """Search each pass for parameters without gradient; needed only by models that skip layers."""

    def build(self) -> Any:
        from raytx_torch.engine import TorchStrategy

        return TorchStrategy(
            distributed=True, bucket_cap_mb=self.bucket_cap_mb, find_unused_parameters=self.find_unused_parameters
        )
