"""What ZeRO holds of each parameter, read whole and set: fp32 master and optimizer state, wherever they are sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from raytx.components import Part
from raytx_deepspeed.tensor import Share


class ShardedState:
    """The trained parameters of a DeepSpeed engine, one stage of a pipeline or all there are.

    Stage 0 in fp32 keeps torch's own optimizer; the others wrap it in fp32 masters, apart from the parameters.
    """

    def __init__(
        self,
        engine: Any,
        trained: Mapping[str, nn.Parameter],
        *,
        shares: Mapping[str, Share],
        parts: Callable[[tuple[int, ...]], tuple[Part, ...]],
        turn: tuple[int, int],
    ) -> None:
        """Take an initialised engine and its trained parameters by Hugging Face name.

        `shares` are those of the whole model. `parts` names the optimizer's state tensors of a parameter by its shape.
        `turn` is this rank's place among those that hold the same, and their number: they take turns at being given
        arrays, so that each writes its share. Of a tensor-parallel group, which has one turn, it is the first.
        """
        self._engine, self._trained, self._shares, self._parts = engine, trained, shares, parts
        self._turn, self._first = turn, all(share.rank == 0 for share in shares.values())
        self._stage: int = engine.zero_optimization_stage()
        self.masters = hasattr(engine.optimizer, "optimizer")
        """Whether DeepSpeed holds fp32 masters apart from the module's parameters."""
        self.steps = 0
        """Optimizer steps that the loaded state has seen."""
        if self.masters and trained:
            self._create()

    def tensors(self) -> Iterator[tuple[str, Part, np.ndarray | None]]:
        """Yield (name, part, array), one tensor at a time; whole on the rank whose turn it is, None on the others."""
        place, places = self._turn
        for count, (name, parameter) in enumerate(self._trained.items()):
            mine = count % places == place
            yield name, "weight", self._whole(name, self._weight(parameter), mine=mine)
            for part in self._parts(_shape(parameter)):
                yield name, part, self._whole(name, self._moment(parameter, part), mine=mine)

    def load(self, read: Callable[[str, Part], np.ndarray], *, step: int) -> None:
        """Set every tensor from a reader of whole ones, and the optimizer's step count."""
        with torch.no_grad():
            self._load(read)
        self.count(step)

    def count(self, step: int) -> None:
        """Let the optimizer have done so many steps."""
        self.steps = step
        for state in self._base().state.values():
            if "step" in state:
                state["step"].fill_(step)

    def _load(self, read: Callable[[str, Part], np.ndarray]) -> None:
        for name, parameter in self._trained.items():
            weight = self._mine(name, read(name, "weight"))
            self._set_weight(parameter, weight)
            for part in self._parts(_shape(parameter)):
                self._set_moment(parameter, part, self._mine(name, read(name, part)))

    # ---- whole and part

    def _whole(self, name: str, part: torch.Tensor, *, mine: bool) -> np.ndarray | None:
        """Join the parts of tensor-parallel ranks on the first of them, where it is their turn."""
        if not mine:
            return None
        share = self._shares.get(name)
        if share is None or share.dim is None:
            return part.detach().cpu().numpy() if self._first else None
        parts = [torch.empty_like(part) for _ in range(share.size)] if self._first else None
        dist.gather(part.detach().contiguous(), parts, group=share.group, group_dst=0)
        return None if parts is None else share.join([part.cpu().numpy() for part in parts])

    def _mine(self, name: str, whole: np.ndarray) -> torch.Tensor:
        share = self._shares.get(name)
        part = np.array(whole if share is None else share.take(whole), order="C")
        return torch.from_numpy(part).to(self._engine.device)

    # ---- what DeepSpeed holds

    def _weight(self, parameter: nn.Parameter) -> torch.Tensor:
        return safe_get_full_fp32_param(parameter) if self.masters else parameter.data

    def _moment(self, parameter: nn.Parameter, part: Part) -> torch.Tensor:
        if self.masters:
            return safe_get_full_optimizer_state(parameter, part)
        return self._state(parameter)[part]

    def _state(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Return the state of a whole parameter, created where no step has done so."""
        state = self._base().state
        if not state[parameter]:
            state[parameter] = self._zeros(parameter)
        return state[parameter]

    def _set_weight(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Set the master and the working copy, which is separate from it in fp32 too."""
        if not self.masters:
            parameter.data.copy_(value)
        elif self._stage < 3:
            safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)
        else:
            safe_set_local_fp32_param(parameter, _partition(parameter, value))
            with GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)

    def _set_moment(self, parameter: nn.Parameter, part: Part, value: torch.Tensor) -> None:
        if not self.masters:
            self._state(parameter)[part].copy_(value)
        elif self._stage < 3:
            safe_set_full_optimizer_state(parameter, value, part)
        else:
            safe_set_local_optimizer_state(parameter, _partition(parameter, value), part)

    def _create(self) -> None:
        """Create the optimizer's state, as zeros, before the first step.

        ZeRO links parameters to their state once, after the first of its parameter groups has stepped, when the others
        have none yet: without this the state of all but the first group could not be read or set.
        """
        base, optimizer = self._base(), self._engine.optimizer
        for place, partition in enumerate(self._partitions()):
            swapped = self._stage == 3 and optimizer._swappable_optimizer_subgroup(place)
            if swapped:
                optimizer._optimizer_states_and_gradient_swap_in(place)
            base.state[partition] = self._zeros(partition)
            if swapped:
                optimizer._optimizer_states_and_gradient_swap_out(place)
        if self._stage < 3:
            optimizer._lazy_init_hp_params_optimizer_state()

    def _zeros(self, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the optimizer's state before the first step; a fused one counts steps where it computes."""
        parts = self._parts(tuple(like.shape))
        device = like.device if self._base().defaults.get("fused") else "cpu"
        counter = {"step": torch.tensor(0.0, device=device)} if "exp_avg" in parts else {}
        return {**counter, **{part: torch.zeros_like(like) for part in parts}}

    def _partitions(self) -> list[torch.Tensor]:
        """This rank's flat fp32 masters, to which the base optimizer's state belongs."""
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [partition for group in self._base().param_groups for partition in group["params"]]

    def _base(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        return optimizer.optimizer if self.masters else optimizer


def saved_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return what a state dict holds besides parameters, by name."""
    kept = dict(module.named_buffers())
    names = sorted(module.state_dict().keys() & kept.keys()) if kept else []
    return {name: kept[name] for name in names if kept[name].numel()}


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _partition(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """Return this rank's equal part of a flattened value; DeepSpeed's own setter runs over the end of the last one."""
    length = parameter.ds_tensor.ds_numel
    padded = value.new_zeros(length * dist.get_world_size(parameter.ds_process_group))
    padded[: value.numel()] = value.flatten()
    return padded.narrow(0, length * dist.get_rank(parameter.ds_process_group), length)
