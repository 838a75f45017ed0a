"""The engine of `single`, `ddp` and `fsdp`: one training step, wherever the parameters lie."""

from __future__ import annotations

import contextlib
import math
import resource
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from raytx.components import Microbatch, Part
from raytx.errors import CheckpointError
from raytx.optimizer import build, parameter_groups, state_parts
from raytx.plan import Plan
from raytx.pulse import phase
from raytx.seeding import seed_generators
from raytx_torch.loss_scale import LossScale
from raytx_torch.moments import count_steps, create_state
from raytx_torch.parts import local, part_of, whole

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What matrix products are computed in, by precision; master weights, reduced gradients and moments stay fp32."""


class Spread(Protocol):
    """How a module, filled and in its place, lies on the ranks."""

    module: nn.Module
    """Carries the Hugging Face names."""
    called: nn.Module
    """Whose forward pass brings it about that gradients are reduced."""
    device: torch.device
    """Where it computes."""
    home: torch.device
    """Where parameters, gradients and the optimizer's state rest."""
    divisor: int
    """Gradients arrive as their sum over ranks divided by this."""
    group: dist.ProcessGroup | None
    """The ranks whose parts make up each whole parameter; None where every rank holds it whole."""

    def accumulating(self, *, more: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a forward and backward pass, which `more` of the same step follow or not."""

    def settle(self) -> None:
        """Let go of what a forward pass without a backward one leaves in memory."""


class TorchEngine:
    """One rank's part of a model and of its optimizer."""

    def __init__(self, spread: Spread, *, plan: Plan, rank: int) -> None:
        self._spread, self._rank, self._ranks = spread, rank, plan.layout.data_parallel_size
        self._optim, self._precision = plan.recipe.optim, plan.recipe.train.precision
        self._step = 0
        self.module = spread.module
        self._trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self._buffers = _persistent_buffers(self.module)
        self._scale = LossScale() if self._precision == "fp16" else None
        groups = parameter_groups(self._trained, weight_decay=self._optim.weight_decay)
        self._optimizer: torch.optim.Optimizer = build(self._optim, groups, device_type=spread.home.type)

    # ---- steps

    def train_batch(self, microbatches: list[Microbatch], *, lr: float) -> dict[str, float]:
        self._spread.called.train()
        loss = torch.zeros((), dtype=torch.float64, device=self._spread.device)
        for place, microbatch in enumerate(microbatches):
            with self._spread.accumulating(more=place < len(microbatches) - 1):
                loss += self._backward(microbatch)
        return self._update(self._sum(loss), lr=lr)

    def _backward(self, microbatch: Microbatch) -> torch.Tensor:
        """Add a microbatch's gradients; return its share of the global loss."""
        phase("forward")
        seed_generators(microbatch.seed)
        with self._autocast():
            share = self._spread.called(**self._move(microbatch)).loss * microbatch.weight
        phase("backward")
        (share * (self._spread.divisor * self._factor)).backward()
        return share.detach().double()

    @property
    def _factor(self) -> float:
        """What the loss, and with it every gradient, is multiplied by."""
        return 1.0 if self._scale is None else self._scale.value

    def _update(self, total: torch.Tensor, *, lr: float) -> dict[str, float]:
        """Clip, step and forget the gradients; return what the step's row tells of it.

        The numbers are asked for before the update, which depends on them, and both at once: the device is waited for
        once a step, and updates while the next batch is made.
        """
        phase("update")
        gradients = [local(p.grad) for p in self._trained.values() if p.grad is not None]
        norm = self._norm(gradients) / self._factor
        loss, size = torch.stack((total, norm)).tolist()
        told = {} if self._scale is None or not math.isfinite(loss) else self._scale.judge(size)
        if math.isfinite(loss) and math.isfinite(size):
            self._clip(gradients, norm, factor=told.get("loss_scale", 1.0))
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad()
        return {"loss": loss, "grad_norm": 0.0 if told.get("skipped") else size, **told}

    def _norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Return the global norm of what lies in parts, summed in fp64.

        torch's own clip_grad_norm_ sums squares in fp32. On the quickstart that was off by 1.3e-5, which is more than
        strategies may differ by.
        """
        squares = torch.zeros((), dtype=torch.float64, device=self._spread.device)
        if gradients:
            norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
            squares += torch.stack(norms).square().sum().to(squares.device)
        if self._spread.group is not None:
            dist.all_reduce(squares, group=self._spread.group)
        return squares.sqrt()

    def _clip(self, gradients: list[torch.Tensor], norm: torch.Tensor, *, factor: float) -> None:
        """Scale gradients down to the limit, after taking out the factor that the loss was multiplied by."""
        limit = self._optim.max_grad_norm
        if gradients and (limit is not None or factor != 1):
            share = torch.ones_like(norm) if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, (share / factor).float().to(self._spread.home))

    @torch.no_grad()
    def eval_batch(self, microbatch: Microbatch, *, logits: bool) -> tuple[float, np.ndarray | None]:
        self.module.eval()
        seed_generators(microbatch.seed)
        with self._autocast():
            output = self.module(**self._move(microbatch))
        self._spread.settle()
        loss = float("nan") if output.loss is None else output.loss.item()
        return loss, output.logits.float().cpu().numpy() if logits else None

    # ---- ranks

    def gather(self, value: Any) -> list[Any]:
        if self._ranks == 1:
            return [value]
        values: list[Any] = [None] * self._ranks
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        self.gather(None)

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        phase("collective")
        if self._ranks > 1:
            dist.all_reduce(value)
        return value

    # ---- state

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Part, np.ndarray | None]]:
        """Ranks take turns at writing, so that each holds and writes its share; buffers are rank 0's, as DDP's are."""
        for place, (name, part, tensor) in enumerate(self._kept()):
            value, writer = whole(tensor), 0 if name in self._buffers else place % self._ranks
            yield name, part, value.cpu().numpy() if writer == self._rank else None

    @torch.no_grad()
    def load_tensors(self, read: Callable[[str, Part], np.ndarray], *, step: int) -> None:
        for name, part, tensor in self._kept():
            value = torch.from_numpy(read(name, part))
            if value.shape != tensor.shape:
                raise CheckpointError(
                    f"{part} of {name!r} is {tuple(value.shape)} in the checkpoint, {tuple(tensor.shape)} in the model"
                )
            local(tensor).copy_(part_of(value, like=tensor))
        count_steps(self._optimizer, step)
        self._step = step

    def _kept(self) -> Iterator[tuple[str, Part, torch.Tensor]]:
        """Yield what training changes: trained parameters (tied ones once), saved buffers and the optimizer's state."""
        for name, parameter in self._trained.items():
            yield name, "weight", parameter.detach()
        for name in self._buffers:
            yield name, "weight", self.module.get_buffer(name)
        create_state(self._optimizer)
        for name, parameter in self._trained.items():
            for part in state_parts(self._optim, parameter.shape):
                yield name, part, self._optimizer.state[parameter][part]

    def scalars(self) -> dict[str, float]:
        return {} if self._scale is None else self._scale.scalars()

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        """Called after load_tensors: steps that were skipped are none of the optimizer's."""
        if self._scale is not None and scalars:
            self._scale.load(scalars)
            count_steps(self._optimizer, self._step - self._scale.skipped)

    def peak_memory(self) -> int:
        if self._spread.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._spread.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    # ---- placing

    def _move(self, microbatch: Microbatch) -> dict[str, torch.Tensor]:
        return {key: torch.from_numpy(value).to(self._spread.device) for key, value in microbatch.features.items()}

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = AUTOCAST.get(self._precision)
        return torch.autocast(self._spread.device.type, dtype=dtype, enabled=dtype is not None)


def _persistent_buffers(module: nn.Module) -> list[str]:
    """Return the names of the buffers that a state dict holds, in the module's order."""
    return [
        f"{prefix}.{leaf}" if prefix else leaf
        for prefix, owner in module.named_modules()
        for leaf, buffer in owner._buffers.items()
        if buffer is not None and buffer.numel() and leaf not in owner._non_persistent_buffers_set
    ]
