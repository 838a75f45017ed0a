"""DeepSpeed's PipelineEngine with the right norm, exact sums, and shapes that are known and not sent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import deepspeed.comm as comm
import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

from raytx_deepspeed.finite import forget
from raytx_deepspeed.pipeline_module import Fed


class StageEngine(PipelineEngine):
    """One rank of a pipeline. Losses and norms are those of the whole batch and the whole model, on every rank."""

    module: Any
    max_norm: float | None = None
    """To which gradients are clipped."""
    norm: float = 0.0
    """Of the last update's gradients, before clipping."""
    _arriving: tuple[tuple[int, ...], torch.dtype] | None = None
    """Trailing dimensions and dtype of the hidden states that come from the stage before."""
    _told: bool = False
    """Whether the next stage knows these of ours."""

    # ---- a batch

    def train_step(self, fed: Sequence[Fed]) -> tuple[float, float]:
        """Do one update; return the global loss, and the global gradient norm before clipping."""
        self.module.feed(fed)
        loss = self.train_batch(iter([(of.ids, of.target) for of in fed]))
        return float(loss), self.norm

    @torch.no_grad()
    def measure(self, fed: Fed, *, logits: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the mean loss of a microbatch and, where asked, its logits, on every rank of this copy of the model.

        DeepSpeed's own eval_batch averages over the data-parallel ranks, whose microbatches may weigh differently.
        """
        self.module.eval()
        self.module.feed([fed])
        self._compute_loss, self.eval_return_logits = True, logits
        self.set_dataiterator(iter([(fed.ids, fed.target)]))
        self._exec_schedule(self._inference_schedule(1))
        loss = self._from_last(self.loss.float() if self.is_last_stage() else torch.zeros((), device=self.device))
        answers = self._from_last_shaped(self.outputs) if logits else None
        self.outputs, self.eval_return_logits = None, False
        return loss, answers

    def _from_last(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.is_pipe_parallel:
            comm.broadcast(tensor, self._loss_stage_global_rank(), group=self.grid.get_pipe_parallel_group())
        return tensor

    def _from_last_shaped(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """Broadcast (batch, length, vocabulary) fp32 logits, which the other stages know no shape of."""
        if self.is_last_stage():
            assert tensor is not None
            tensor = tensor.float().contiguous()
            self._from_last(torch.tensor(tensor.shape, device=self.device))
        else:
            shape = self._from_last(torch.zeros(3, dtype=torch.int64, device=self.device))
            tensor = torch.empty(shape.tolist(), device=self.device)
        return self._from_last(tensor)

    # ---- sums over ranks

    def _aggregate_total_loss(self) -> torch.Tensor:
        """Sum the microbatches' shares over the data-parallel ranks, in fp64."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.grid.get_slice_parallel_rank() == 0:  # tensor-parallel ranks have the same
            total += self.module.loss_fn.taken()
        comm.all_reduce(total)
        return total

    def _exec_reduce_tied_grads(self) -> None:
        """Add up tied parameters' gradients over stages and copies of the model at once.

        DeepSpeed adds over stages first and over copies later, stage by stage, in orders that may differ: from the
        third copy on, what is tied would drift apart. It still averages over copies, which by then are equal.
        """
        for tie in self.module.ties:
            comm.all_reduce(tie.parameter.grad, group=tie.group)
            tie.parameter.grad /= self.dp_world_size

    # ---- clipping

    def _take_model_step(self, lr_kwargs: Any) -> None:
        """Clip, for both ZeRO stages as one process does, then update.

        DeepSpeed's own norm for stage 0 counts the whole parameters of the first pipeline stage alone, and a tied one
        twice; for stage 1 it is summed in fp32, and its factor rounded twice, which Adam makes visible in some steps.
        """
        gradients = list(self._gradients())
        norm = self._norm(gradients)
        self.norm = norm.item()
        if self.max_norm is not None and gradients and math.isfinite(self.norm):
            factor = (self.max_norm / (norm.float() + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([gradient for _, gradient in gradients], factor)
        if self.zero_optimization():
            # DeepSpeed would sum it once more, in fp32; it asks only to leave out what is not finite
            self.optimizer.scaled_global_norm = lambda: norm.float() * self.optimizer.loss_scale
        elif not math.isfinite(self.norm):
            forget(self.module.parameters())
        super()._take_model_step(lr_kwargs)
        vars(self.optimizer).pop("scaled_global_norm", None)

    def _gradients(self) -> Iterator[tuple[Any, torch.Tensor]]:
        """Yield (parameter, gradient) of what this rank will update: with ZeRO, parts of its partition."""
        if not self.zero_optimization():
            yield from ((p, p.grad) for p in self.module.parameters() if p.grad is not None)
            return
        for index, parameters in enumerate(self.optimizer.params_in_partition):
            pieces = (g for g in self.optimizer.averaged_gradients[index] if not getattr(g, "_zero_padding", False))
            yield from zip(parameters, pieces, strict=False)  # zeros that fill the partition may come last

    def _norm(self, gradients: Sequence[tuple[Any, torch.Tensor]]) -> torch.Tensor:
        """Return the norm over stages, tensor-parallel ranks and partitions in fp64, each parameter counted once."""
        first = self.grid.get_slice_parallel_rank() == 0
        mine = [
            gradient
            for parameter, gradient in gradients
            if not parameter.ds_pipe_replicated and (first or getattr(parameter, "tensor_model_parallel", False))
        ]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        if mine:
            total += torch.stack(torch._foreach_norm(mine, 2, dtype=torch.float64)).square().sum()
        comm.all_reduce(total, group=None if self.zero_optimization() else self.grid.get_model_parallel_group())
        return total.sqrt() / (self.optimizer.loss_scale if self.zero_optimization() else 1.0)

    # ---- hidden states and gradients between stages

    def _send_tensor_meta(self, buffer: torch.Tensor, recv_stage: int) -> None:
        if not self._told:
            super()._send_tensor_meta(buffer, recv_stage)
            self._told = True

    def _recv_tensor_meta(self, send_stage: int) -> torch.Tensor:
        """Return a buffer for the next microbatch's hidden states; batch and length are those of its ids."""
        if self._arriving is None:
            buffer = super()._recv_tensor_meta(send_stage)
            self._arriving = (tuple(buffer.shape[2:]), buffer.dtype)
            return buffer
        trailing, dtype = self._arriving
        return self._allocate_or_extend_buffers(0, [*self.module.fed[0].ids.shape, *trailing], dtype)

    def _exec_backward_pass(self, buffer_id: int) -> None:
        """Skip the stage before which nothing is trained: with adapters, its hidden states have no gradient."""
        outputs = self.pipe_buffers["outputs"][buffer_id]
        if self.is_last_stage() or outputs.requires_grad:
            super()._exec_backward_pass(buffer_id)
        else:
            self.pipe_buffers["outputs"][buffer_id] = None

    _INSTRUCTION_MAP: ClassVar[dict[type, Any]] = PipelineEngine._INSTRUCTION_MAP | {
        schedule.BackwardPass: _exec_backward_pass,
        schedule.ReduceTiedGrads: _exec_reduce_tied_grads,
    }
