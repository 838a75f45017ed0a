"""Each sample is fed exactly once an epoch, however often and on however many ranks a run begins again."""

from __future__ import annotations

import shutil

import pytest
from conftest import prepared
from test_resume import directory

from raytx.batches import Batches
from raytx.journal import LEDGER, Journal, rows
from raytx.ledger import audit
from raytx.plan import resolve
from raytx.run import record

SCHEDULE = {"train__ledger": True, "train__steps": 24, "save__every": 3, "save__num_to_keep": None}


def written(recipe, log):
    """Leave what a run logged in its directory, as the journal does."""
    plan = prepared(recipe)
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    record(plan)
    Journal(plan.run_dir).take(log)
    return plan


def killed(recipe, *, after):
    """Take the later checkpoints away: what a run has left that was killed some steps after one."""
    for path in (resolve(recipe).run_dir / "checkpoints").glob("step-*"):
        if path > directory(recipe, after):
            shutil.rmtree(path)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
def test_every_sample_is_fed_once_an_epoch_on_any_ranks_and_after_any_kill(recipe, run_ranks, train_here, packing):
    def attempt(**values):
        return recipe(f"ledger-{packing}", model__packing=packing, **SCHEDULE, **values)

    two, four = ({"strategy": {"type": "ddp"}, "scaling__num_workers": ranks} for ranks in (2, 4))
    plan = written(attempt(), run_ranks([attempt(**two)])[0])
    per_epoch = plan.steps_per_epoch
    assert 3 < per_epoch < 24, "runs must begin again within an epoch, and see a second one"
    assert 12 % per_epoch
    assert plan.num_samples % 8, "the last batch of an epoch must be short for the test to mean much"
    assert audit(plan.run_dir) == []
    for strategy, after in ((four, 3), ({}, 12)):
        killed(attempt(), after=after)
        log = run_ranks([attempt(**strategy)])[0] if strategy else train_here(attempt())[1]
        assert [row["step"] for row in log if row["kind"] == "resumed"] == [after]
        written(attempt(), log)
        assert [row["step"] for row in rows(plan.run_dir / LEDGER)] == list(range(1, 25))
        assert audit(plan.run_dir) == []


def repeating(self, step, indices=Batches.indices):
    window = indices(self, step).copy()
    if step == 5:
        window[1] = window[0]
    return window


def forgetting(self, step, indices=Batches.indices):
    return indices(self, step)[: 4 if step == 5 else None]


@pytest.mark.parametrize(("fault", "words"), [(repeating, ["lost", "repeated"]), (forgetting, ["lost"])])
def test_a_step_fed_the_wrong_samples_is_found_out(recipe, train_here, monkeypatch, fault, words):
    """The ledger has what was collated, not what should have been."""
    monkeypatch.setattr(Batches, "indices", fault)
    made = recipe(f"ledger-{fault.__name__}", **SCHEDULE)
    problems = audit(written(made, train_here(made)[1]).run_dir)
    assert len(problems) == len(words)
    for problem, word in zip(problems, words, strict=True):
        assert problem.startswith("epoch 1 ")
        assert f"samples {word}: " in problem
