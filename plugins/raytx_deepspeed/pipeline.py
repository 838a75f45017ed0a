"""The engine of `deepspeed-3d`: DeepSpeed's pipeline over cut layers, with raytx's batches and checkpoint format."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

from raytx.components import Microbatch, Model, Part, Piece, Weights
from raytx.layout import Layout
from raytx.optimizer import build, parameter_groups, state_parts
from raytx.plan import Plan
from raytx_deepspeed.engine import DTYPES, DeepSpeedEngine, device_of, prepare_deepspeed
from raytx_deepspeed.groups import group_of
from raytx_deepspeed.loss_scale import LossScale
from raytx_deepspeed.pipeline_engine import StageEngine
from raytx_deepspeed.pipeline_module import TRAVELLING, Fed, Loss, StageModule
from raytx_deepspeed.pipeline_timing import costs
from raytx_deepspeed.place import materialise
from raytx_deepspeed.stages import Stages, balanced
from raytx_deepspeed.state import ShardedState, saved_buffers
from raytx_deepspeed.tensor import Share, cut

if TYPE_CHECKING:
    from raytx_deepspeed.three_d import DeepSpeed3D


class ThreeDStrategy:
    """Builds a ThreeDEngine from a structure on the meta device: cut over tensors, then into pieces, then filled."""

    def __init__(self, config: DeepSpeed3D) -> None:
        self._config = config

    def engine(self, module: nn.Module, *, model: Model, weights: Weights, plan: Plan, rank: int) -> ThreeDEngine:
        prepare_deepspeed()
        kept = _kept(module)
        shares = self._cut(module, model, plan.layout, rank)
        pieces = model.pieces(module, TRAVELLING)
        filling = Filling(weights, shares, device_of(plan), DTYPES[plan.recipe.train.precision])
        stages = self._stages(pieces, filling, plan, rank)
        part = StagePart.of(pieces, stages, plan.layout.coordinate(rank).pipeline, filling)
        directory = [Entry.of(name, shape, pieces, stages) for name, shape in kept.items()]
        with _quiet():
            engine = self._engine(part, pieces, stages, directory, plan, filling.device)
        return ThreeDEngine(engine, part, directory=directory, shares=shares, plan=plan, rank=rank)

    def _cut(self, module: nn.Module, model: Model, layout: Layout, rank: int) -> dict[str, Share]:
        size = layout.tensor_parallel_size
        if size == 1:
            return {}
        group = group_of(layout, rank, "tensor")
        return cut(module, model.tensor_plan(module), rank=layout.coordinate(rank).tensor, size=size, group=group)

    def _stages(self, pieces: Sequence[Piece], filling: Filling, plan: Plan, rank: int) -> Stages:
        """Return the plan's stages, or those by the time that rank 0 measures; the same on every rank."""
        assert len(pieces) == len(plan.size.pieces)
        if self._config.partition != "time":
            return plan.stages
        measured: list[Any] = [None]
        if plan.layout.coordinate(rank).data == 0 == plan.layout.coordinate(rank).pipeline:
            train = plan.recipe.train
            measured = [costs(pieces, filling.fill, (train.micro_batch_size, train.max_length), filling.device)]
        dist.broadcast_object_list(measured, src=0)
        return balanced(measured[0], plan.layout.pipeline_parallel_size)

    def _engine(
        self,
        part: StagePart,
        pieces: Sequence[Piece],
        stages: Stages,
        directory: Sequence[Entry],
        plan: Plan,
        device: torch.device,
    ) -> StageEngine:
        layout, optim = plan.layout, plan.recipe.optim
        module = StageModule(
            [piece.module for piece in pieces],
            stages,
            topology=_topology(layout),
            loss=Loss(plan.gradient_accumulation_steps * layout.data_parallel_size),
            parameters=part.trained,
            holders={entry.name: entry.stages for entry in directory if entry.trained and len(entry.stages) > 1},
        )
        module.add_ballast({len(entry.shape) > 1 for entry in directory if entry.trained})
        groups = parameter_groups(module.trained(), weight_decay=optim.weight_decay)
        settings = {key: value for key, (value, _) in self._config.engine_config(plan).items()}
        engine = StageEngine(
            args=None,
            model=module,
            optimizer=build(optim, groups, device_type=device.type),
            mpu=module.mpu(),
            config=settings,
            config_class=DeepSpeedConfig(settings, module.mpu()),
            dist_init_required=False,
        )
        engine.max_norm = optim.max_grad_norm
        return engine


def _topology(layout: Layout) -> PipeModelDataParallelTopology:
    """Return the grid of ranks as DeepSpeed sees it, which is raytx's."""
    topology = PipeModelDataParallelTopology(
        num_pp=layout.pipeline_parallel_size, num_mp=layout.tensor_parallel_size, num_dp=layout.data_parallel_size
    )
    for rank in range(layout.world_size):
        ours, theirs = layout.coordinate(rank), topology.get_coord(rank)
        assert (ours.pipeline, ours.data, ours.tensor) == (theirs.pipe, theirs.data, theirs.model)
    return topology


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what DeepSpeed prints of its grid and stages off the terminal, unless RAYTX_VERBOSE is set."""
    hidden = contextlib.nullcontext() if os.environ.get("RAYTX_VERBOSE") else contextlib.redirect_stdout(io.StringIO())
    with hidden:
        yield


# ---------------------------------------------------------------------------------------------- what a stage holds


@dataclass(frozen=True)
class Filling:
    """How meta tensors of this rank get their numbers."""

    weights: Weights
    shares: Mapping[str, Share]
    device: torch.device
    dtype: torch.dtype

    def fill(self, module: nn.Module, names: Mapping[str, str]) -> None:
        materialise(module, self.weights, self.device, shares=self.shares, names=names, dtype=self.dtype)


@dataclass(frozen=True)
class StagePart:
    """This rank's part of the model, by Hugging Face name."""

    trained: dict[str, nn.Parameter]
    buffers: dict[str, torch.Tensor]
    """Those that are saved."""

    @classmethod
    def of(cls, pieces: Sequence[Piece], stages: Stages, stage: int, filling: Filling) -> StagePart:
        """Give this stage's pieces their numbers; those of the others stay on the meta device."""
        held = range(*stages[stage])
        holder = nn.ModuleDict({str(index): pieces[index].module for index in held})
        names = {f"{index}.{local}": name for index in held for local, name in pieces[index].names.items()}
        filling.fill(holder, names)
        return cls(
            trained={names[local]: p for local, p in holder.named_parameters() if p.requires_grad},
            buffers={names[local]: buffer for local, buffer in saved_buffers(holder).items()},
        )


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint, and who holds it."""

    name: str
    shape: tuple[int, ...]
    trained: bool
    """A trained parameter, or a buffer that is saved."""
    stages: tuple[int, ...]
    """Every stage that holds it; the first one writes it."""

    @classmethod
    def of(cls, name: str, kept: tuple[bool, tuple[int, ...]], pieces: Sequence[Piece], stages: Stages) -> Entry:
        trained, shape = kept
        holding = [index for index, piece in enumerate(pieces) if name in piece.names.values()]
        where = [stage for stage, span in enumerate(stages) if any(index in range(*span) for index in holding)]
        assert where, f"no piece holds {name}"
        return cls(name, shape, trained, tuple(where))


def _kept(module: nn.Module) -> dict[str, tuple[bool, tuple[int, ...]]]:
    """Return what a checkpoint holds of the uncut structure, in order: (whether it is trained, its whole shape)."""
    trained = {name: (True, tuple(p.shape)) for name, p in module.named_parameters() if p.requires_grad}
    return trained | {name: (False, tuple(b.shape)) for name, b in saved_buffers(module).items()}


# ------------------------------------------------------------------------------------------------------- the engine


class ThreeDEngine(DeepSpeedEngine):
    """One rank of a pipeline: one stage's pieces, or its share of their layers, with their optimizer."""

    def __init__(
        self,
        engine: StageEngine,
        part: StagePart,
        *,
        directory: Sequence[Entry],
        shares: Mapping[str, Share],
        plan: Plan,
        rank: int,
    ) -> None:
        self._engine: Any = engine
        self.module = engine.module
        self._part, self._directory, self._place = part, directory, plan.layout.coordinate(rank)
        self._scale = LossScale(engine) if plan.recipe.train.precision == "fp16" else None
        self._parts = lambda shape: state_parts(plan.recipe.optim, shape)
        mine = [entry.name for entry in directory if entry.trained and self._place.pipeline in entry.stages]
        self._state = ShardedState(
            engine,
            {name: part.trained[name] for name in mine},
            shares=shares,
            parts=self._parts,
            turn=(self._place.data, plan.layout.data_parallel_size),
        )

    def train_batch(self, microbatches: list[Microbatch], *, lr: float) -> dict[str, float]:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        fed = [Fed.of(microbatch, self._engine.device, weighed=True) for microbatch in microbatches]
        loss, norm = self._engine.train_step(fed)
        return self._outcome(loss, norm)

    def eval_batch(self, microbatch: Microbatch, *, logits: bool) -> tuple[float, np.ndarray | None]:
        fed = Fed.of(microbatch, self._engine.device, weighed=False)
        loss, answers = self._engine.measure(fed, logits=logits)
        return loss.item(), None if answers is None else answers.cpu().numpy()

    def tensors(self) -> Iterator[tuple[str, Part, np.ndarray | None]]:
        """Every stage yields the names of all, in the structure's order; of a tied one the first stage's is written."""
        mine = self._state.tensors()
        for entry in self._directory:
            for part in ("weight", *self._parts(entry.shape)) if entry.trained else ("weight",):
                array = self._array(entry, mine)
                yield entry.name, part, array if self._place.pipeline == entry.stages[0] else None

    def _array(self, entry: Entry, mine: Iterator[tuple[str, Part, np.ndarray | None]]) -> np.ndarray | None:
        if self._place.pipeline not in entry.stages:
            return None
        if entry.trained:
            return next(mine)[2]
        first = self._place.data == 0 == self._place.tensor
        return self._part.buffers[entry.name].cpu().numpy() if first else None

    def load_tensors(self, read: Callable[[str, Part], np.ndarray], *, step: int) -> None:
        self._state.load(read, step=step)
        for name, buffer in self._part.buffers.items():
            buffer.copy_(torch.from_numpy(read(name, "weight")))
