"""The learning rate of each update: linear warm-up to the peak, then one of five shapes.

A shape is a share of the peak, from 1 to 0. Those that fall to an end reach it after the last update, not at it: no
update is spent on standing still.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raytx.sections import Optim


def lr(optim: Optim, step: int, *, steps: int, warmup: int) -> float:
    """Return the learning rate of an update, counted from 0, of `steps` in all; the first `warmup` rise to the peak."""
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    return optim.lr * floored(_share(optim, step, steps=steps, warmup=warmup), floor=optim.min_lr_ratio)


def _share(optim: Optim, step: int, *, steps: int, warmup: int) -> float:
    match optim.schedule:
        case "constant":
            return 1.0
        case "linear":
            return linear(_done(step, first=warmup, end=steps))
        case "cosine":
            return cosine(_done(step, first=warmup, end=steps))
        case "wsd":
            falling = decay_steps(optim, steps=steps, warmup=warmup)
            return stable_then_linear(_done(step, first=steps - falling, end=steps))
        case "inverse_sqrt":
            return inverse_sqrt(step, warmup=warmup)


def linear(done: float) -> float:
    """Fall in equal steps."""
    return 1.0 - done


def cosine(done: float) -> float:
    """Fall along half a cosine (Loshchilov and Hutter 2017)."""
    return (1 + math.cos(math.pi * done)) / 2


def stable_then_linear(done: float) -> float:
    """Stay at the peak until the decay begins, at 0 done, then fall in equal steps (Hu et al. 2024)."""
    return linear(max(0.0, done))


def inverse_sqrt(step: int, *, warmup: int) -> float:
    """Fall with the root of the updates done, from the peak at the last one of warm-up (Vaswani et al. 2017)."""
    return math.sqrt(max(warmup, 1) / (step + 1))


def floored(share: float, *, floor: float) -> float:
    """Squeeze a share of 0 to 1 into `floor` to 1."""
    return floor + (1.0 - floor) * share


def _done(step: int, *, first: int, end: int) -> float:
    """Return how much of [first, end) lies behind an update; negative before it."""
    return (step - first) / max(1, end - first)


def warmup_steps(optim: Optim, *, steps: int) -> int:
    """Return how many updates rise to the peak."""
    return _count(optim.warmup, steps=steps)


def decay_steps(optim: Optim, *, steps: int, warmup: int) -> int:
    """Return how many updates at the end fall, under wsd: at least one, and none of warm-up."""
    return min(max(1, _count(optim.decay, steps=steps)), max(1, steps - warmup))


def _count(amount: float, *, steps: int) -> int:
    """A share of all steps, below 1, or a number of them."""
    return round(amount * steps) if amount < 1 else int(amount)


def refusal(optim: Optim, *, steps: int) -> str | None:
    """Return why a schedule does not fit into so many steps, or None."""
    if optim.warmup >= steps:
        return (
            f"optim.warmup={optim.warmup:g} steps, but training has {steps}: optim.lr would never be reached. "
            "Give fewer, or a share of all steps such as 0.1"
        )
    counted = optim.warmup >= 1 or optim.decay >= 1
    needed = warmup_steps(optim, steps=steps) + _count(optim.decay, steps=steps)
    if optim.schedule == "wsd" and counted and needed > steps:
        return (
            f"optim.warmup={optim.warmup:g} and optim.decay={optim.decay:g} take {needed} steps, but training has "
            f"{steps}. Give fewer, or shares of all steps such as 0.1"
        )
    return None
