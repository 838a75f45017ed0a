"""One stage of a pipeline as DeepSpeed's PipelineModule: this rank's pieces, and the microbatches they run on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed.comm as comm
import torch
from deepspeed.pipe import PipelineModule
from torch import nn
from torch.nn import functional

from raytx.components import Microbatch
from raytx.seeding import seed_generators
from raytx.tasks.base import IGNORED
from raytx_deepspeed.finite import tainted
from raytx_deepspeed.stages import Stages

TRAVELLING = ("attention_mask", "position_ids")
"""Features that every piece needs besides hidden states; None for those a microbatch does not have."""


@dataclass(frozen=True)
class Fed:
    """What a stage knows of a microbatch by itself. All ranks of a model copy read the same samples, so nothing but
    hidden states has to be sent from stage to stage: not even their shape."""

    ids: torch.Tensor
    """(batch, length)"""
    travelling: tuple[torch.Tensor | None, ...]
    target: tuple[torch.Tensor, ...]
    """Labels (batch, length) and, in training, the microbatch's weight; empty where there are no labels."""
    seed: int

    @classmethod
    def of(cls, microbatch: Microbatch, device: torch.device, *, weighed: bool) -> Fed:
        tensors = {key: torch.from_numpy(value).to(device) for key, value in microbatch.features.items()}
        weight = (torch.tensor(microbatch.weight, device=device),) if weighed else ()
        return cls(
            ids=tensors["input_ids"],
            travelling=tuple(tensors.get(name) for name in TRAVELLING),
            target=(tensors["labels"], *weight) if "labels" in tensors else (),
            seed=microbatch.seed,
        )


class Loss:
    """Mean cross entropy of the next token; times what DeepSpeed will divide it by, where the microbatch has a weight.

    The shares of the global loss are added up in fp64 on the way.
    """

    def __init__(self, divisor: int) -> None:
        self._divisor = divisor
        """Accumulation steps x data-parallel ranks."""
        self._total: torch.Tensor | float = 0.0

    def __call__(self, logits: torch.Tensor, target: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return a scalar for logits (batch, length, vocabulary) and a Fed's target; nan where there is none."""
        if not target:
            return logits.new_tensor(float("nan"), dtype=torch.float32)
        labels, *weight = target
        mean = cross_entropy(logits, labels)
        if not weight:
            return mean
        share = mean * weight[0]
        self._total = self._total + share.detach().double()
        return tainted(share) * self._divisor

    def taken(self) -> torch.Tensor | float:
        """Return the sum of shares since this was last asked."""
        total, self._total = self._total, 0.0
        return total


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean in nats of logits (batch, length, vocabulary), in fp32, against the labels (batch, length) one
    further on; 0 where all of these are ignored."""
    targets = functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
    total = functional.cross_entropy(logits.float().flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


@dataclass(frozen=True)
class Tie:
    """A parameter that several stages hold."""

    parameter: nn.Parameter
    group: Any
    """The process group of all ranks that hold this part of it, in whatever stage and copy of the model."""


class StageModule(PipelineModule):
    """The pieces of one stage. Those of the others are given too, and let go."""

    def __init__(
        self,
        pieces: Sequence[nn.Module],
        stages: Stages,
        *,
        topology: Any,
        loss: Loss,
        parameters: Mapping[str, nn.Parameter],
        holders: Mapping[str, Sequence[int]],
    ) -> None:
        """`parameters` are this stage's by Hugging Face name, `holders` the stages of those that several train."""
        self._stages, self._by_name, self._holders = stages, dict(parameters), dict(holders)
        super().__init__(layers=pieces, topology=topology, loss_fn=loss, dynamic_shape=True)
        self._layer_specs = []
        self.fed: deque[Fed] = deque()
        """The microbatches whose forward pass is still to come, in order."""

    def feed(self, fed: Iterable[Fed]) -> None:
        self.fed = deque(fed)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the next microbatch through the stage: from its ids, or hidden states, to hidden states or logits."""
        fed = self.fed.popleft()
        travel: Any = (hidden, *fed.travelling)
        for place, piece in enumerate(self.forward_funcs, self._local_start):
            # By piece, so that dropout is the same however the pieces are staged and whatever ran in between.
            seed_generators(fed.seed << 16 | place)
            travel = piece(travel)
        return travel[0].contiguous() if isinstance(travel, tuple) else travel

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def add_ballast(self, kinds: Iterable[bool]) -> None:
        """Add a zero that nothing uses for each kind of parameter (whether it decays) that other stages train.

        DeepSpeed's optimizers sum norms over all stages group by group, so each needs as many groups, none empty.
        """
        here = {parameter.ndim > 1 for parameter in self.trained().values()}
        missing = sorted(set(kinds) - here)
        like = next(self.parameters())
        self.ballast = nn.ParameterList(
            nn.Parameter(torch.zeros((1, 1) if decays else (1,), dtype=like.dtype, device=like.device))
            for decays in missing
        )
        for parameter in self.ballast:
            parameter.ds_pipe_replicated = True

    # ---- what DeepSpeed's constructor asks for

    def _partition_layers(self, method: str = "") -> None:
        self.parts = [0, *(last for _, last in self._stages)]
        self._set_bounds(*self._stages[self._topo.get_coord(self.global_rank).pipe])

    def _index_tied_modules(self) -> dict[str, Any]:
        """Group the ranks that hold a tied parameter. All but the first stage's copies count for nothing in norms."""
        self.ties: list[Tie] = []
        copies = range(self._grid.data_parallel_size)
        for name, stages in self._holders.items():
            for part in range(self._grid.slice_parallel_size):
                ranks = [self._topo.get_rank(pipe=s, data=copy, model=part) for s in stages for copy in copies]
                group = comm.new_group(ranks=ranks)
                if self.global_rank in ranks:
                    self.ties.append(Tie(self._by_name[name], group))
                    self._by_name[name].ds_pipe_replicated = self.stage_id != stages[0]
        return {}  # DeepSpeed's own record goes by modules that are built twice; ours by parameters
