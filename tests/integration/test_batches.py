"""Which samples a step trains on: every sample once an epoch, the same set on any number of ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from raytx.batches import Batches, evaluation_batches, spread
from raytx.plan import resolve
from raytx.prepare import prepare


@pytest.fixture(scope="module")
def made(recipe):
    """Return plan, task and samples for a number of ranks; 75 samples, so the last of ten batches of 8 is short."""

    def make(ranks):
        settings = {
            "strategy": {"type": "ddp"},
            "scaling__num_workers": ranks,
            "train__steps": None,
            "train__epochs": 2,
        }
        plan, prepared = prepare(resolve(recipe("batches", **settings)), Console(quiet=True))
        task = plan.recipe.model.build().task(prepared.processor)
        return plan, task, prepared.samples("train"), prepared.samples("test")

    return make


def test_every_sample_comes_once_an_epoch(made):
    plan, task, samples, _ = made(1)
    batches = Batches(plan, task, samples, dp_rank=0)
    assert len(samples) % 8, "the last batch must be short for the test to mean much"
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = Counter(int(index) for step in steps for index in batches.indices(step))
        assert seen == Counter(range(len(samples)))
    assert batches.indices(0).tolist() != batches.indices(plan.steps_per_epoch).tolist()
    assert plan.steps == 2 * plan.steps_per_epoch


@pytest.mark.parametrize("ranks", [2, 4])
def test_microbatches_are_those_of_one_rank_whatever_the_number_of_ranks(made, ranks):
    plan, task, samples, _ = made(1)
    one = Batches(plan, task, samples, dp_rank=0)
    many_plan = made(ranks)[0]
    for step in range(plan.steps_per_epoch):
        alone = one.microbatches(step)
        shared = [m for r in range(ranks) for m in Batches(many_plan, task, samples, dp_rank=r).microbatches(step)]
        assert len(alone) == len(shared) == 4
        for left, right in zip(alone, shared, strict=True):
            assert (left.weight, left.seed) == (right.weight, right.seed)
            for key, value in left.features.items():
                np.testing.assert_array_equal(value, right.features[key])


def test_weights_add_up_to_one_also_in_a_short_batch(made):
    plan, task, samples, _ = made(4)
    for step in (0, plan.steps_per_epoch - 1):
        ranks = [Batches(plan, task, samples, dp_rank=rank).microbatches(step) for rank in range(4)]
        assert {len(share) for share in ranks} == {plan.gradient_accumulation_steps}
        assert sum(m.weight for share in ranks for m in share) == pytest.approx(1.0)
    assert any(m.weight == 0 for share in ranks for m in share), "the short batch must leave a slot empty"


def test_another_seed_gives_another_order(made):
    plan, task, samples, _ = made(1)
    changed = replace(plan, recipe=plan.recipe.override({"train.seed": 99}))
    left, right = (Batches(p, task, samples, dp_rank=0).indices(0).tolist() for p in (plan, changed))
    assert left != right


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_evaluation_counts_every_held_out_target_once_and_ranks_step_equally_often(made, ranks):
    _, task, _, held_out = made(1)
    shares = [
        list(evaluation_batches(task, held_out, micro_batch_size=2, dp_rank=r, dp_size=ranks, limit=None))
        for r in range(ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    assert sum(targets for share in shares for _, targets in share) == held_out.num_targets.sum()


def test_a_subset_of_the_held_out_split_is_spread_over_all_of_it():
    chosen = spread(1000, 50)
    assert len(set(chosen.tolist())) == 50
    assert chosen.tolist() == sorted(chosen.tolist()) == spread(1000, 50).tolist()
    assert chosen.min() < 100
    assert chosen.max() > 900
    assert spread(5, 50).tolist() == [0, 1, 2, 3, 4]
