"""The state of a torch optimizer before its first update: there from the start, so that it can be read and set."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters without state what an optimizer gives them in its first update, and change nothing else.

    Whatever the optimizer, its own step creates its state: zero gradients at a learning rate of zero move no weight.
    """
    new = [p for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state]
    if not new:
        return
    settings = [{key: group[key] for key in ("lr", "weight_decay")} for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
    for parameter in new:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, before in zip(optimizer.param_groups, settings, strict=True):
        group.update(before)
    count_steps(optimizer, 0, parameters=new)


def count_steps(
    optimizer: torch.optim.Optimizer, steps: int, *, parameters: Iterable[torch.Tensor] | None = None
) -> None:
    """Say how many updates of some parameters, or all, are done; what corrects for few of them depends on it."""
    for state in (optimizer.state[p] for p in (list(optimizer.state) if parameters is None else parameters)):
        if isinstance(state.get("step"), torch.Tensor):
            state["step"].fill_(steps)
        elif "step" in state:
            state["step"] = steps
