"""The engine of `single` and `ddp`: plain torch, the numbers every other strategy is held to."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raytx.components import Microbatch, Part
from raytx.optimizer import parameter_groups
from raytx.plan import Plan


@dataclass(frozen=True)
class TorchStrategy:
    """Builds a TorchEngine, wrapped in DistributedDataParallel where asked."""

    distributed: bool
    bucket_cap_mb: float = 25
    find_unused_parameters: bool = False

    def init_context(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def engine(self, module: nn.Module, *, plan: Plan, rank: int) -> TorchEngine:
        device = _device(plan)
        module.to(device)
        wrapped: nn.Module = module
        if self.distributed and plan.world_size > 1:
            wrapped = DistributedDataParallel(
                module,
                device_ids=[device] if device.type == "cuda" else None,
                bucket_cap_mb=self.bucket_cap_mb,
                find_unused_parameters=self.find_unused_parameters,
                gradient_as_bucket_view=True,
            )
        return TorchEngine(module, wrapped, plan=plan, rank=rank, device=device)


class TorchEngine:
    """One rank's model and AdamW. Master weights are fp32; bf16 is autocast around the forward pass."""

    def __init__(self, module: nn.Module, wrapped: nn.Module, *, plan: Plan, rank: int, device: torch.device) -> None:
        self.module, self._wrapped, self._rank, self._device = module, wrapped, rank, device
        self._ranks = plan.layout.data_parallel_size
        self._max_norm = plan.recipe.optim.max_grad_norm
        self._bf16 = plan.recipe.train.precision == "bf16"
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        optim = plan.recipe.optim
        self._optimizer = torch.optim.AdamW(
            parameter_groups(self._trained, weight_decay=optim.weight_decay),
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
        )

    # ---- steps

    def train_batch(self, microbatches: list[Microbatch], *, lr: float) -> dict[str, float]:
        self._wrapped.train()
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        for place, microbatch in enumerate(microbatches):
            with self._synchronised(last=place == len(microbatches) - 1):
                loss += self._backward(microbatch)
        norm = self._clip()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        return {"loss": self._sum(loss), "grad_norm": norm.item()}

    def _backward(self, microbatch: Microbatch) -> torch.Tensor:
        """Add a microbatch's gradients; return its share of the global loss."""
        torch.manual_seed(microbatch.seed)
        with self._autocast():
            share = self._wrapped(**self._move(microbatch)).loss * microbatch.weight
        (share * self._ranks).backward()  # DistributedDataParallel divides by the ranks
        return share.detach().double()

    def _clip(self) -> torch.Tensor:
        """Scale gradients down to the limit; return their norm before, summed in fp64.

        torch's own clip_grad_norm_ sums squares in fp32. On the quickstart that was off by 1.3e-5, which is more than
        strategies may differ by.
        """
        norms = [
            torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in self._trained.values() if p.grad is not None
        ]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if self._max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._trained.values(), self._max_norm, norm.float())
        return norm

    def _synchronised(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Average gradients over ranks only in the last microbatch of a step."""
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._wrapped.no_sync()

    @torch.no_grad()
    def eval_batch(self, microbatch: Microbatch, *, logits: bool) -> tuple[float, np.ndarray | None]:
        self.module.eval()
        with self._autocast():
            output = self.module(**self._move(microbatch))
        loss = float("nan") if output.loss is None else output.loss.item()
        return loss, output.logits.float().cpu().numpy() if logits else None

    # ---- ranks

    def gather(self, value: Any) -> list[Any]:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return [value]
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        self.gather(None)

    def _sum(self, value: torch.Tensor) -> float:
        if self._ranks > 1:
            dist.all_reduce(value)
        return value.item()

    # ---- state

    def tensors(self) -> Iterator[tuple[str, Part, np.ndarray | None]]:
        """Every rank holds everything: rank 0 writes it."""
        for name, tensor in self._persistent().items():
            yield name, "weight", self._mine(tensor)
        for name, parameter in self._trained.items():
            state = self._optimizer.state[parameter]
            for part in ("exp_avg", "exp_avg_sq"):
                yield name, part, self._mine(state.get(part, torch.zeros_like(parameter)))

    def _mine(self, tensor: torch.Tensor) -> np.ndarray | None:
        return tensor.detach().cpu().numpy() if self._rank == 0 else None

    def load_tensors(self, read: Callable[[str, Part], np.ndarray], *, step: int) -> None:
        with torch.no_grad():
            for name, tensor in self._persistent().items():
                tensor.copy_(torch.from_numpy(read(name, "weight")))
        for name, parameter in self._trained.items():
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                **{part: torch.from_numpy(read(name, part)).to(self._device) for part in ("exp_avg", "exp_avg_sq")},
            }

    def _persistent(self) -> dict[str, torch.Tensor]:
        """What training changes: trained parameters (tied ones once) and saved buffers."""
        parameters = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        buffers = {name: value for name, value in self.module.state_dict().items() if name not in parameters}
        return {
            **self._trained,
            **{name: b for name, b in buffers.items() if isinstance(b, torch.Tensor) and b.numel()},
        }

    def peak_memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    # ---- placing

    def _move(self, microbatch: Microbatch) -> dict[str, torch.Tensor]:
        return {key: torch.from_numpy(value).to(self._device) for key, value in microbatch.features.items()}

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16)


def _device(plan: Plan) -> torch.device:
    if not plan.recipe.scaling.use_gpu:
        return torch.device("cpu")
    from ray.train.torch import get_device

    return get_device()
