"""The whole model on every rank: `single`, and `ddp`, which averages gradients while they are computed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raytx.components import Model, Weights
from raytx.place import place
from raytx.plan import Plan
from raytx_torch.device import device_of
from raytx_torch.engine import TorchEngine
from raytx_torch.parts import filled


@dataclass(frozen=True)
class WholeStrategy:
    """Builds the engine, with DistributedDataParallel around the module where there is more than one rank."""

    bucket_cap_mb: float = 25
    find_unused_parameters: bool = False

    def engine(self, module: nn.Module, *, model: Model, weights: Weights, plan: Plan, rank: int) -> TorchEngine:
        device = device_of(plan)
        place(module, lambda name, meta: filled(meta, weights(name), device))
        called = self._averaging(module, device) if plan.world_size > 1 else module
        return TorchEngine(Whole(module, called, device, plan.world_size), plan=plan, rank=rank)

    def _averaging(self, module: nn.Module, device: torch.device) -> nn.Module:
        return DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            bucket_cap_mb=self.bucket_cap_mb,
            find_unused_parameters=self.find_unused_parameters,
            gradient_as_bucket_view=True,
        )


@dataclass(frozen=True)
class Whole:
    """A spread in which nothing is divided."""

    module: nn.Module
    called: nn.Module
    device: torch.device
    divisor: int

    @property
    def home(self) -> torch.device:
        return self.device

    @property
    def group(self) -> dist.ProcessGroup | None:
        return None

    def accumulating(self, *, more: bool) -> contextlib.AbstractContextManager[Any]:
        if more and isinstance(self.called, DistributedDataParallel):
            return self.called.no_sync()
        return contextlib.nullcontext()

    def settle(self) -> None:
        """Nothing was gathered."""
