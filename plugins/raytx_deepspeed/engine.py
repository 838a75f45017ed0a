"""The engine of `deepspeed`: ZeRO's sharding with raytx's batches, schedule and checkpoint format."""

from __future__ import annotations

import logging
import math
import platform
import resource
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from raytx.components import Microbatch, Model, Part, Weights
from raytx.errors import ResourceError
from raytx.optimizer import build, parameter_groups, state_parts
from raytx.plan import Plan
from raytx.pulse import phase
from raytx.seeding import seed_generators
from raytx_deepspeed.finite import forget, tainted
from raytx_deepspeed.groups import Groups
from raytx_deepspeed.loss_scale import LossScale
from raytx_deepspeed.place import materialise
from raytx_deepspeed.sequence import Slices
from raytx_deepspeed.state import ShardedState, saved_buffers
from raytx_deepspeed.tensor import Share, cut

if TYPE_CHECKING:
    from raytx_deepspeed.strategy import DeepSpeed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DeepSpeedStrategy:
    """Builds a DeepSpeedEngine from a structure on the meta device."""

    def __init__(self, config: DeepSpeed) -> None:
        self._config = config

    def engine(self, module: nn.Module, *, model: Model, weights: Weights, plan: Plan, rank: int) -> DeepSpeedEngine:
        prepare_deepspeed()
        if "nvme" in (self._config.offload_optimizer, self._config.offload_param):
            check_drives()
        groups, settings = Groups(plan.layout, rank), self._settings(plan)
        shares = self._cut(module, model, groups)
        device = device_of(plan)
        placed = Partitioning(groups, settings) if self._config.stage == 3 else lambda parameter: None
        materialise(module, weights, device, shares=shares, dtype=DTYPES[plan.recipe.train.precision], placed=placed)
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=self._optimizer(module, plan, device), config=settings, mpu=groups
        )
        return DeepSpeedEngine(engine, module, groups=groups, shares=shares, plan=plan)

    def _settings(self, plan: Plan) -> dict[str, Any]:
        return {key: value for key, (value, _) in self._config.engine_config(plan).items()}

    def _cut(self, module: nn.Module, model: Model, groups: Groups) -> dict[str, Share]:
        size = groups.layout.tensor_parallel_size
        if size == 1:
            return {}
        return cut(module, model.tensor_plan(module), rank=groups.coordinate.tensor, size=size, group=groups.tensor)

    def _optimizer(self, module: nn.Module, plan: Plan, device: torch.device) -> torch.optim.Optimizer:
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        steps_on = "cpu" if self._config.offload_optimizer else device.type
        decaying = parameter_groups(trained, weight_decay=plan.recipe.optim.weight_decay)
        return build(plan.recipe.optim, decaying, device_type=steps_on)


class Partitioning:
    """Stage 3: leaves of each parameter this rank's partition, as soon as it is placed. Collective, like ZeRO's own."""

    def __init__(self, groups: Groups, settings: Mapping[str, Any]) -> None:
        self._groups, self._settings = groups, dict(settings)
        self._first: nn.Parameter | None = None

    def __call__(self, parameter: nn.Parameter) -> None:
        if self._first is not None:
            self._first.convert_to_zero_parameters(param_list=[parameter])
            return
        self._first = parameter
        deepspeed.zero.Init(
            module=nn.ParameterList([parameter]),
            data_parallel_group=self._groups.replicas,
            config_dict_or_path=self._settings,
            mpu=self._groups,
        )


def prepare_deepspeed() -> None:
    """Use torch's collectives instead of an operator compiled for minutes at first use.

    A killed build leaves a lock file on which every later process would wait for ever, without a message.
    """
    import deepspeed.comm as comm
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not comm.is_initialized():
        comm.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)


def check_drives() -> None:
    """Raise ResourceError where DeepSpeed cannot read and write local drives asynchronously."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ResourceError(
            f"strategy.offload_optimizer and offload_param: nvme needs libaio with its headers on every node, and "
            f"{platform.node()} has none: apt install libaio-dev, or offload to cpu"
        )


def device_of(plan: Plan) -> torch.device:
    """Return the GPU that was made this rank's current one when ranks met, or the CPU."""
    if not plan.recipe.scaling.use_gpu:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


class DeepSpeedEngine:
    """One rank of a ZeRO job, which may share its replica's layers with others of its tensor-parallel group."""

    def __init__(
        self, engine: Any, module: nn.Module, *, groups: Groups, shares: Mapping[str, Share], plan: Plan
    ) -> None:
        self._engine, self.module, self._groups, self._shares = engine, module, groups, shares
        self._ranks = _divisor(engine, groups)
        self._slices = Slices(module, groups) if groups.layout.sequence_parallel_size > 1 else None
        self._accumulation = plan.gradient_accumulation_steps
        self._max_norm = plan.recipe.optim.max_grad_norm
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._scale = LossScale(engine) if plan.recipe.train.precision == "fp16" else None
        self._state = ShardedState(
            engine,
            self._trained,
            shares=shares,
            parts=lambda shape: state_parts(plan.recipe.optim, shape),
            turn=(groups.get_sequence_data_parallel_rank(), groups.get_sequence_data_parallel_world_size()),
        )

    # ---- steps

    def train_batch(self, microbatches: list[Microbatch], *, lr: float) -> dict[str, float]:
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        for microbatch in microbatches:
            loss += self._backward(microbatch)
            norm = self._step()
        phase("collective")
        dist.all_reduce(loss, group=self._groups.replicas)
        if self._slices is not None:
            self._slices.check()
        return self._outcome(loss.item(), norm)

    def _backward(self, microbatch: Microbatch) -> torch.Tensor:
        """Add a microbatch's gradients; return its share of the global loss."""
        phase("forward")
        seed_generators(microbatch.seed, part=self._groups.coordinate.sequence)  # slices drop other places
        share = self._engine(**self._features(microbatch)).loss.float() * microbatch.weight
        # backward() divides by the accumulation steps and reduction by ranks; the shares need neither.
        phase("backward")
        self._engine.backward(tainted(share) * self._accumulation * self._ranks)
        return share.detach().double()

    def _step(self) -> float:
        """Update at the last microbatch of a step; return the gradients' norm before clipping, 0 elsewhere."""
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return 0.0
        phase("update")
        if self._state.masters:
            self._engine.step()
            return float(self._engine.get_global_grad_norm())
        norm = self._clip()
        if not math.isfinite(norm):
            forget(self._trained.values())
        self._engine.step()
        return norm

    def _clip(self) -> float:
        """Scale the gradients of stage 0, which are whole and reduced by now, down to the limit; return their norm.

        DeepSpeed's own clipping tells no norm there, and sums it in fp32.
        """
        parts, wholes = self._squares(shared=True), self._squares(shared=False)
        dist.all_reduce(parts, group=self._groups.tensor)
        norm = (parts + wholes).sqrt()
        if self._max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._trained.values(), self._max_norm, norm.float())
        return norm.item()

    def _squares(self, *, shared: bool) -> torch.Tensor:
        """Return the sum of squares of the gradients that tensor-parallel ranks share, or of those each has whole."""
        total = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        for parameter in self._trained.values():
            if parameter.grad is not None and getattr(parameter, "tensor_model_parallel", False) == shared:
                total += torch.linalg.vector_norm(parameter.grad, dtype=torch.float64) ** 2
        return total

    def _outcome(self, loss: float, norm: float) -> dict[str, float]:
        """Return what a step's row tells of it."""
        return {"loss": loss, "grad_norm": norm} if self._scale is None else self._scale.outcome(loss, norm)

    @torch.no_grad()
    def eval_batch(self, microbatch: Microbatch, *, logits: bool) -> tuple[float, np.ndarray | None]:
        self._engine.eval()
        seed_generators(microbatch.seed, part=self._groups.coordinate.sequence)
        output = self._engine(**self._features(microbatch))
        loss = torch.tensor(float("nan"), device=self._engine.device) if output.loss is None else output.loss
        answer = output.logits.float()
        if self._slices is not None:
            dist.all_reduce(loss, group=self._groups.sequence)
            answer = self._slices.whole(answer, length=microbatch.features["input_ids"].shape[1])
        return loss.item(), answer.cpu().numpy() if logits else None

    # ---- ranks

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        self.gather(None)

    # ---- state

    def tensors(self) -> Iterator[tuple[str, Part, np.ndarray | None]]:
        yield from self._state.tensors()
        first = dist.get_rank() == 0
        for name, buffer in saved_buffers(self.module).items():
            yield name, "weight", buffer.detach().cpu().numpy() if first else None

    def load_tensors(self, read: Callable[[str, Part], np.ndarray], *, step: int) -> None:
        self._state.load(read, step=step)
        for name, buffer in saved_buffers(self.module).items():
            buffer.copy_(torch.from_numpy(read(name, "weight")))

    def scalars(self) -> dict[str, float]:
        return {} if self._scale is None else self._scale.scalars()

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        """Called after load_tensors: steps that were skipped are none of the optimizer's."""
        if self._scale is not None and scalars:
            self._scale.load(scalars)
            self._state.count(self._state.steps - self._scale.skipped)

    def peak_memory(self) -> int:
        if self._engine.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._engine.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _features(self, microbatch: Microbatch) -> dict[str, torch.Tensor]:
        """Return what this rank's forward pass takes, on its device."""
        features = {key: torch.from_numpy(v).to(self._engine.device) for key, v in microbatch.features.items()}
        return features if self._slices is None else self._slices.mine(features)


def _divisor(engine: Any, groups: Groups) -> int:
    """Return what DeepSpeed divides the sum of gradients by.

    Slices of one sample are parts of one gradient, and stages 0 to 2 leave them out of the average; the reduce-scatter
    of stage 3 averages over every rank it reduces over.
    """
    averaged = engine.zero_optimization_stage() == 3
    return groups.get_sequence_data_parallel_world_size() if averaged else groups.layout.data_parallel_size
