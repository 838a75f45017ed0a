"""The engine of `deepspeed`: ZeRO's sharding with raytx's batches, schedule and checkpoint format."""

from __future__ import annotations

import contextlib
import logging
import resource
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import nn

from raytx.components import Microbatch, Part
from raytx.optimizer import parameter_groups
from raytx.plan import Plan

if TYPE_CHECKING:
    from raytx_deepspeed.strategy import DeepSpeed

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedStrategy:
    """Builds a DeepSpeedEngine from a module."""

    def __init__(self, config: DeepSpeed) -> None:
        self._config = config

    def init_context(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def engine(self, module: nn.Module, *, plan: Plan, rank: int) -> DeepSpeedEngine:
        _avoid_shared_memory_op()
        optim = plan.recipe.optim
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        groups = parameter_groups(trained, weight_decay=optim.weight_decay)
        settings = {key: value for key, (value, _) in self._config.engine_config(plan).items()}
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps),
            config=settings,
            dist_init_required=False,
        )
        return DeepSpeedEngine(engine, module, stage=self._config.stage, plan=plan, rank=rank)


def _avoid_shared_memory_op() -> None:
    """Use torch's collectives instead of an operator compiled for minutes at first use.

    A killed build leaves a lock file on which every later process would wait for ever, without a message.
    """
    import deepspeed.comm as comm
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not comm.is_initialized():
        comm.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)


class DeepSpeedEngine:
    """One rank of a ZeRO job. Stage 0 keeps torch's own optimizer; the others wrap it in sharded fp32 masters."""

    def __init__(self, engine: Any, module: nn.Module, *, stage: int, plan: Plan, rank: int) -> None:
        self._engine, self.module, self._stage, self._rank = engine, module, stage, rank
        self._ranks = plan.layout.data_parallel_size
        self._accumulation = plan.gradient_accumulation_steps
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._sharded = stage > 0
        """Whether DeepSpeed holds fp32 masters apart from the module's parameters."""
        self._norm = 0.0
        if self._sharded:
            self._materialise()

    # ---- steps

    def train_batch(self, microbatches: list[Microbatch], *, lr: float) -> dict[str, float]:
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        for microbatch in microbatches:
            torch.manual_seed(microbatch.seed)
            share = self._engine(**self._move(microbatch)).loss * microbatch.weight
            # backward() divides by the accumulation steps and reduction by the ranks; the shares need neither.
            self._engine.backward(share * self._accumulation * self._ranks)
            if not self._sharded and self._engine.is_gradient_accumulation_boundary():
                self._norm = self._reduced_norm()
            self._engine.step()
            loss += share.detach().double()
        if self._ranks > 1:
            dist.all_reduce(loss)
        norm = self._engine.get_global_grad_norm() if self._sharded else self._norm
        return {"loss": loss.item(), "grad_norm": float(norm)}

    def _reduced_norm(self) -> float:
        """Stage 0 in fp32 tells no norm; its gradients are whole and reduced when the last backward() returns."""
        grads = [p.grad for p in self._trained.values() if p.grad is not None]
        return float(
            torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads]))
        )

    @torch.no_grad()
    def eval_batch(self, microbatch: Microbatch, *, logits: bool) -> tuple[float, np.ndarray | None]:
        self._engine.eval()
        output = self._engine(**self._move(microbatch))
        loss = float("nan") if output.loss is None else output.loss.item()
        return loss, output.logits.float().cpu().numpy() if logits else None

    # ---- ranks

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        self.gather(None)

    # ---- state

    def tensors(self) -> Iterator[tuple[str, Part, np.ndarray | None]]:
        """Gather one tensor at a time; rank 0 writes it."""
        for name, parameter in self._trained.items():
            yield name, "weight", self._mine(safe_get_full_fp32_param(parameter) if self._sharded else parameter.data)
            for part in MOMENTS:
                yield name, part, self._mine(self._moment(parameter, part))
        for name, buffer in self._buffers().items():
            yield name, "weight", self._mine(buffer)

    def _moment(self, parameter: nn.Parameter, part: Part) -> torch.Tensor:
        if self._sharded:
            return safe_get_full_optimizer_state(parameter, part)
        return self._base().state[parameter].get(part, torch.zeros_like(parameter))

    def _mine(self, tensor: torch.Tensor) -> np.ndarray | None:
        if self._rank != 0:
            return None
        return (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().numpy()

    def load_tensors(self, read: Callable[[str, Part], np.ndarray], *, step: int) -> None:
        if self._sharded:
            self._load_sharded(read)
        else:
            self._load_whole(read)
        for name, buffer in self._buffers().items():
            buffer.copy_(torch.from_numpy(read(name, "weight")))
        for state in self._base().state.values():
            state["step"] = torch.tensor(float(step))

    def _load_sharded(self, read: Callable[[str, Part], np.ndarray]) -> None:
        for name, parameter in self._trained.items():
            weight = torch.from_numpy(read(name, "weight")).to(self._engine.device)
            safe_set_full_fp32_param(parameter, weight)
            self._set_working_copy(parameter, weight)
            for part in MOMENTS:
                safe_set_full_optimizer_state(
                    parameter, torch.from_numpy(read(name, part)).to(self._engine.device), part
                )

    def _load_whole(self, read: Callable[[str, Part], np.ndarray]) -> None:
        for name, parameter in self._trained.items():
            parameter.data.copy_(torch.from_numpy(read(name, "weight")))
            self._base().state[parameter] = {
                part: torch.from_numpy(read(name, part)).to(self._engine.device) for part in MOMENTS
            }

    def _set_working_copy(self, parameter: nn.Parameter, weight: torch.Tensor) -> None:
        """The copy that forward uses is separate from the master, in fp32 too."""
        if self._stage < 3:
            parameter.data.copy_(weight)
            return
        with GatheredParameters([parameter], modifier_rank=0):
            if self._rank == 0:
                parameter.data.copy_(weight)

    def _materialise(self) -> None:
        """Create Adam's moments, as zeros, before the first step.

        ZeRO links parameters to their moments once, after the first of its parameter groups has stepped, when the
        others have none yet: without this the moments of all but the first group could not be read or set.
        """
        base = self._base()
        for partition in self._partitions():
            base.state[partition] = {
                "step": torch.tensor(0.0),
                **{part: torch.zeros_like(partition) for part in MOMENTS},
            }
        if self._stage < 3:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> list[torch.Tensor]:
        """This rank's flat fp32 masters, to which the base optimizer's state belongs."""
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [partition for group in self._base().param_groups for partition in group["params"]]

    def _base(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        return optimizer.optimizer if self._sharded else optimizer

    def _buffers(self) -> dict[str, torch.Tensor]:
        """Saved buffers: what a state dict holds besides parameters."""
        kept = dict(self.module.named_buffers())
        names = sorted(self.module.state_dict().keys() & kept.keys()) if kept else []
        return {name: kept[name] for name in names if kept[name].numel()}

    def peak_memory(self) -> int:
        if self._engine.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._engine.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _move(self, microbatch: Microbatch) -> dict[str, torch.Tensor]:
        return {key: torch.from_numpy(value).to(self._engine.device) for key, value in microbatch.features.items()}
