"""Pieces are shared out so that the dearest stage is as cheap as it can be."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from raytx_deepspeed.stages import balanced, explicit


def dearest(costs, stages):
    return max(sum(costs[first:last]) for first, last in stages)


@pytest.mark.parametrize("seed", range(40))
def test_no_other_stages_have_a_cheaper_dearest_one(seed):
    draw = random.Random(seed)
    costs = [draw.randint(1, 9) for _ in range(draw.randint(1, 8))]
    count = draw.randint(1, len(costs))
    every = [explicit((0, *rest), len(costs)) for rest in combinations(range(1, len(costs)), count - 1)]
    assert balanced(costs, count) in every
    assert dearest(costs, balanced(costs, count)) == min(dearest(costs, stages) for stages in every)


def test_stages_are_consecutive_and_none_is_empty():
    stages = balanced([100, 1, 1, 1], 3)
    assert stages[0] == (0, 1)
    assert [first for first, _ in stages[1:]] == [last for _, last in stages[:-1]]
    assert all(first < last for first, last in stages)


def test_of_equally_dear_stages_even_ones_are_chosen():
    assert balanced([9, 1, 1, 1, 1], 3) == ((0, 1), (1, 3), (3, 5))


def test_pieces_that_cost_nothing_are_held_too():
    assert balanced([0.0, 0.0, 0.0], 3) == ((0, 1), (1, 2), (2, 3))


def test_many_layers_over_many_stages_are_even():
    assert {last - first for first, last in balanced([1.0] * 128, 16)} == {8}
