"""Steps that are not finite are left out under every strategy, as if they had not been, and counted."""

from __future__ import annotations

import numpy as np
import pytest
import raytx_unsteady
from conftest import prepared
from raytx_unsteady import MARKED, mark
from test_resume import contents, directory, label

from raytx.batches import Batches
from raytx.checkpoint import Checkpoint
from raytx.errors import TrainingError
from raytx.prepare import Samples
from raytx.testing import FakeEntryPoint, installed

STEPS, POISONED = 6, 4
OMITTED = {"left-out": 0, "omitted": POISONED}
PIPELINE = {"type": "deepspeed-3d", "pipeline_parallel_size": 2}
RANKS = {
    1: [{"type": "single"}],
    2: [
        {"type": "ddp"},
        {"type": "fsdp"},
        *({"type": "deepspeed", "stage": stage} for stage in range(4)),
        {"type": "deepspeed", "stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
        {"type": "deepspeed", "stage": 1, "tensor_parallel_size": 2},
        {"type": "deepspeed", "stage": 3, "sequence_parallel_size": 2},
        PIPELINE,
    ],
    4: [PIPELINE | {"tensor_parallel_size": 2}, PIPELINE | {"stage": 0}],
}
CASES = [(size, label(strategy)) for size, strategies in RANKS.items() for strategy in strategies]
SCHEDULE = {"train__steps": STEPS, "save__every": POISONED - 1, "save__num_to_keep": None}


@pytest.fixture(scope="module", autouse=True)
def plugin():
    with installed(FakeEntryPoint("raytx_unsteady", raytx_unsteady)):
        yield


def prepared_samples(plan):
    return Samples.open(f"{plan.prepared}/train.arrow")


def sample_of(recipe, step):
    """Return a sample of a step that none of the others there is taken for, and its mark."""
    plan = prepared(recipe)
    samples = prepared_samples(plan)
    window = Batches(plan, None, samples, dp_rank=0).indices(step - 1).tolist()
    marks = {index: int(mark(np.array([samples[[index]][0]["input_ids"]]))[0]) for index in range(len(samples))}
    unique = [index for index, found in marks.items() if list(marks.values()).count(found) == 1]
    chosen = next(index for index in window[3:] if index in unique and samples.lengths[index] > MARKED)
    return chosen, marks[chosen]


@pytest.fixture(scope="module")
def poisoned(recipe):
    """Make a recipe of which one sample, of the step POISONED, gives an infinite embedding."""
    index, poison = sample_of(recipe("nonfinite-look", model__type="unsteady", **SCHEDULE), POISONED)

    def make(name, **values):
        values = {"model__type": "unsteady", "model__poison": poison, "train__max_nonfinite": 1} | SCHEDULE | values
        return recipe(name, **values)

    make.index = index
    return make


@pytest.fixture(scope="module")
def runs(poisoned, run_ranks):
    """Every strategy with the poisoned step, and with no such step at all."""
    found = {}
    for size, strategies in RANKS.items():
        kinds = [(s, label(s), kind) for s in strategies for kind in OMITTED]
        recipes = [
            poisoned(f"nonfinite-{size}-{name}-{kind}", strategy=s, scaling__num_workers=size)
            for s, name, kind in kinds
        ]
        rows = run_ranks(recipes, omitted=[OMITTED[kind] for *_, kind in kinds])
        for (_, name, kind), made, logged in zip(kinds, recipes, rows, strict=True):
            found[size, name, kind] = (made, logged)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("size", "strategy"), CASES)
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(runs, poisoned, size, strategy):
    ours, rows = runs[size, strategy, "left-out"]
    theirs, _ = runs[size, strategy, "omitted"]
    (told,) = [row for row in rows if row["kind"] == "nonfinite"]
    assert (told["step"], told["samples"], told["count"]) == (POISONED, [poisoned.index], 1)
    assert told["loss"] in ("nan", "inf")
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, 3, 5, 6]
    last, expected = contents(directory(ours, STEPS)), contents(directory(theirs, STEPS))
    assert last.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(last[key], value, err_msg=key)
    assert Checkpoint(directory(ours, STEPS)).state.nonfinite == 1


# ---- the limit, in one process


def steps(rows, kind="step"):
    return [row["step"] for row in rows if row["kind"] == kind]


def test_without_leave_the_first_such_step_stops_the_run_and_its_sample_is_named(poisoned, train_here):
    told = rf"step {POISONED}: .*not finite: {poisoned.index}\. Training has diverged.*train.max_nonfinite is 0"
    with pytest.raises(TrainingError, match=told):
        train_here(poisoned("nonfinite-none", train__max_nonfinite=0))


def test_such_steps_are_counted_over_attempts_and_one_more_than_the_limit_stops_the_run(poisoned, train_here):
    """The sample comes in each of two epochs."""
    schedule = {"train__steps": 16, "save__every": 4}
    with pytest.raises(TrainingError, match=r"such steps are 2 by now, train\.max_nonfinite is 1"):
        train_here(poisoned("nonfinite-counted", **schedule))
    with pytest.raises(TrainingError, match="such steps are 2 by now"):
        train_here(poisoned("nonfinite-counted", **schedule))  # though this attempt has met one alone
    state, rows = train_here(poisoned("nonfinite-counted", train__max_nonfinite=2, **schedule))
    assert len(steps(rows, "nonfinite")) == 1
    assert (state.step, state.nonfinite) == (16, 2)
    unbroken = poisoned("nonfinite-unbroken", train__max_nonfinite=2, **schedule)
    assert len(steps(train_here(unbroken)[1], "nonfinite")) == 2
    expected = contents(directory(unbroken, 16))
    for key, value in contents(directory(poisoned("nonfinite-counted", **schedule), 16)).items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)


def test_an_infinite_gradient_under_a_finite_loss_accuses_no_sample(poisoned, train_here, monkeypatch):
    from raytx_torch.engine import TorchEngine

    norm, calls = TorchEngine._norm, []

    def overflowing(self, gradients):
        calls.append(None)
        return norm(self, gradients) * (float("inf") if len(calls) == 2 else 1)

    monkeypatch.setattr(TorchEngine, "_norm", overflowing)
    _, rows = train_here(poisoned("nonfinite-gradient", train__steps=4, model__poison=-1))
    (told,) = [row for row in rows if row["kind"] == "nonfinite"]
    assert (told["step"], told["grad_norm"]) == (2, "inf")
    assert len(told["samples"]) == 8
    assert np.isfinite(float(told["loss"]))
    assert any("by itself is finite" in row["text"] for row in rows if row["kind"] == "remark")
