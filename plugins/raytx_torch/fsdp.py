"""Fully sharded data parallel: every rank holds a slice of each parameter, gathered layer by layer when it is needed.

This is torch's FSDP2. The structure is sharded while it is still on the meta device; then each rank reads one tensor
after the other and keeps its slice.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from raytx.components import Model, Weights
from raytx.errors import RecipeError
from raytx.place import place
from raytx.plan import Plan
from raytx_torch.device import device_of
from raytx_torch.engine import AUTOCAST, TorchEngine
from raytx_torch.parts import filled

if TYPE_CHECKING:
    from raytx_torch.strategies import FSDP


class FSDPStrategy:
    """Builds the engine on a sharded module."""

    def __init__(self, config: FSDP) -> None:
        self._config = config

    def engine(self, module: nn.Module, *, model: Model, weights: Weights, plan: Plan, rank: int) -> TorchEngine:
        device = device_of(plan)
        home = torch.device("cpu") if self._config.cpu_offload else device
        mesh = _mesh(device, plan.world_size, replicas=self._config.replicas)
        self._shard(module, mesh, precision=plan.recipe.train.precision)
        place(module, lambda name, meta: filled(meta, weights(name), _home(meta, parameters=home, buffers=device)))
        spread = Sharded(module, device, home, mesh, reduce_each=self._config.reduce_each_microbatch)
        return TorchEngine(spread, plan=plan, rank=rank)

    def _shard(self, module: nn.Module, mesh: DeviceMesh, *, precision: str) -> None:
        """Make every layer a unit of its own that is gathered at once, and what is around the layers another."""
        _check(module)
        config, gpu = self._config, mesh.device_type != "cpu"
        for unit in [*layers(module), module]:
            fully_shard(
                unit,
                mesh=mesh,
                # None: layers are freed, what is around them stays, as backward needs it first
                reshard_after_forward=None if config.reshard_after_forward else False,
                mp_policy=_precision(precision),
                offload_policy=CPUOffloadPolicy(pin_memory=gpu) if config.cpu_offload else OffloadPolicy(),
            )
        if config.find_unused_parameters:
            module.set_reduce_scatter_unused_params(True)


def _mesh(device: torch.device, world_size: int, *, replicas: int) -> DeviceMesh:
    """Return the grid of replicas and shards; neighbouring ranks, which share a node, share a replica."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():  # a single worker needs no one to talk to, but FSDP asks for a group
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    shards = world_size // replicas
    if replicas == 1:
        return init_device_mesh(device.type, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, shards), mesh_dim_names=("replica", "shard"))


def _home(tensor: torch.Tensor, *, parameters: torch.device, buffers: torch.device) -> torch.device:
    """Offloading is for what is gathered: buffers are not, and must be where they are used."""
    return parameters if isinstance(tensor, nn.Parameter) else buffers


def _check(module: nn.Module) -> None:
    """A plan does not know the shapes of parameters, so this is found when the model is built."""
    if scalars := [name for name, parameter in module.named_parameters() if not parameter.ndim]:
        raise RecipeError(
            f"strategy.type=fsdp: {scalars[0]} is a single number, one of {len(scalars)} such parameters, and fsdp has "
            "no way to shard those; use ddp or deepspeed"
        )


def _precision(precision: str) -> MixedPrecisionPolicy:
    """Layers are gathered in half precision. Inputs stay as they are: autocast, which is on as well, casts them where
    that is safe, and so softmax, norms and loss are computed in fp32 as under every other strategy."""
    if precision not in AUTOCAST:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=AUTOCAST[precision], reduce_dtype=torch.float32, cast_forward_inputs=False)


def layers(module: nn.Module) -> list[nn.Module]:
    """Return the elements of the outermost module lists: decoder layers, encoder layers, blocks.

    One that shares a parameter, or is itself used twice, is left out: it belongs to what is around the layers.
    """
    uses = _uses(module)
    return [
        layer for layer in _listed(module) if (own := _uses(layer)) and all(uses[key] == n for key, n in own.items())
    ]


def _listed(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost elements of module lists. Lists and dictionaries in one are never called themselves."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield child
        else:
            yield from _listed(child)


def _uses(module: nn.Module) -> Counter[int]:
    """Count how often each parameter occurs, by id."""
    modules = (owner for _, owner in module.named_modules(remove_duplicate=False))
    return Counter(id(p) for owner in modules for p in owner._parameters.values() if p is not None)


@dataclass(frozen=True)
class Sharded:
    """A spread in which each parameter is divided over the ranks of a replica."""

    module: FSDPModule
    device: torch.device
    home: torch.device
    mesh: DeviceMesh
    reduce_each: bool

    @property
    def called(self) -> FSDPModule:
        return self.module

    @property
    def divisor(self) -> int:
        return self.mesh.size()

    @property
    def group(self) -> dist.ProcessGroup | None:
        return self.mesh.get_group("shard")

    def accumulating(self, *, more: bool) -> contextlib.AbstractContextManager[Any]:
        if not self.reduce_each:
            self.module.set_requires_gradient_sync(not more)
        return contextlib.nullcontext()

    def settle(self) -> None:
        """What is around the layers stays gathered after a forward pass, waiting for backward."""
        self.module.reshard()
