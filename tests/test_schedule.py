"""The learning rate: exact at its corners, without jumps between them, never below its floor."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from raytx import schedule
from raytx.sections import Optim

SCHEDULES = ("constant", "linear", "cosine", "wsd", "inverse_sqrt")


def rates(*, steps: int = 10, warmup: float = 0, **settings: Any) -> list[float]:
    optim = Optim(**{"lr": 1.0, "warmup": warmup} | settings)
    count = schedule.warmup_steps(optim, steps=steps)
    return [schedule.lr(optim, step, steps=steps, warmup=count) for step in range(steps)]


def at_the_end(*, steps: int, **settings: Any) -> float:
    """The rate of the update after the last one, where those that fall have arrived."""
    return schedule.lr(Optim(lr=1.0, **settings), steps, steps=steps, warmup=0)


def test_the_constant_schedule_stays_at_the_peak() -> None:
    assert rates(schedule="constant") == [1.0] * 10


def test_the_linear_schedule_falls_in_equal_steps() -> None:
    assert rates(schedule="linear") == [1.0 - n / 10 for n in range(10)]


def test_the_cosine_schedule_is_half_a_cosine() -> None:
    assert rates(schedule="cosine") == [(1 + math.cos(math.pi * n / 10)) / 2 for n in range(10)]


def test_warm_up_stable_decay_is_flat_until_its_last_steps_and_then_linear() -> None:
    assert rates(schedule="wsd", warmup=2, decay=4) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("decay", [4, 0.4])
def test_the_decay_is_given_in_steps_or_in_a_share_of_them(decay: float) -> None:
    assert rates(schedule="wsd", decay=decay)[6:] == [1.0, 0.75, 0.5, 0.25]


def test_the_inverse_square_root_halves_the_rate_in_four_times_the_warm_up() -> None:
    found = rates(schedule="inverse_sqrt", steps=64, warmup=4)
    assert (found[3], found[15], found[63]) == (1.0, 0.5, 0.25)


def test_without_warm_up_the_inverse_square_root_starts_at_the_peak() -> None:
    assert rates(schedule="inverse_sqrt") == [math.sqrt(1 / (n + 1)) for n in range(10)]


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("floor", [0.0, 0.1, 0.75])
def test_what_falls_arrives_at_its_floor_after_the_last_update(name: str, floor: float) -> None:
    assert at_the_end(steps=10, schedule=name, min_lr_ratio=floor) == pytest.approx(floor, abs=1e-15)
    assert min(rates(schedule=name, min_lr_ratio=floor)) > floor


def test_a_floor_squeezes_the_shape_between_itself_and_the_peak() -> None:
    plain, raised = rates(schedule="cosine"), rates(schedule="cosine", min_lr_ratio=0.2)
    assert raised == pytest.approx([0.2 + 0.8 * share for share in plain])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [1, 5, 0.25])
def test_warm_up_rises_in_equal_steps_to_the_peak(name: str, warmup: float) -> None:
    count = round(20 * warmup) if warmup < 1 else int(warmup)
    found = rates(schedule=name, steps=20, warmup=warmup)
    assert found[:count] == pytest.approx([(n + 1) / count for n in range(count)])
    assert found[count - 1] == max(found) == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 100, 0.5])
@pytest.mark.parametrize("steps", [1000, 333])
def test_no_schedule_jumps_falls_below_zero_or_rises_after_warm_up(name: str, warmup: float, steps: int) -> None:
    found = rates(schedule=name, steps=steps, warmup=warmup)
    count = round(steps * warmup) if warmup < 1 else int(warmup)
    after = found[count:]
    assert all(0 < rate <= 1 for rate in found)
    assert after == sorted(after, reverse=True)
    if name != "inverse_sqrt":  # which falls by the most in its first steps, by its nature
        assert max(abs(a - b) for a, b in pairwise(found)) < 0.04


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("decay", [0.1, 0.5, 0.9])
def test_a_run_of_few_steps_has_a_decay_that_spares_the_warm_up(steps: int, decay: float) -> None:
    optim = Optim(schedule="wsd", warmup=0.1, decay=decay)
    count = schedule.warmup_steps(optim, steps=steps)
    assert 1 <= schedule.decay_steps(optim, steps=steps, warmup=count) <= steps - count


def test_a_warm_up_that_training_never_finishes_is_refused() -> None:
    told = schedule.refusal(Optim(warmup=10), steps=10)
    assert told is not None
    assert told.startswith("optim.warmup=10 steps, but training has 10")
    assert schedule.refusal(Optim(warmup=9), steps=10) is None


@pytest.mark.parametrize(("warmup", "decay"), [(6, 5), (0.6, 5), (6, 0.5)])
def test_a_warm_up_and_a_decay_that_overlap_are_refused(warmup: float, decay: float) -> None:
    told = schedule.refusal(Optim(schedule="wsd", warmup=warmup, decay=decay), steps=10)
    assert told is not None
    assert told.startswith(f"optim.warmup={warmup:g} and optim.decay={decay:g} take 11 steps, but training has 10")


@pytest.mark.parametrize(("warmup", "decay"), [(5, 5), (0.5, 5), (0.5, 0.5), (0, 10)])
def test_a_warm_up_and_a_decay_that_meet_are_taken(warmup: float, decay: float) -> None:
    assert schedule.refusal(Optim(schedule="wsd", warmup=warmup, decay=decay), steps=10) is None


def test_the_decay_of_another_schedule_takes_no_room() -> None:
    assert schedule.refusal(Optim(schedule="linear", warmup=9.0), steps=10) is None
