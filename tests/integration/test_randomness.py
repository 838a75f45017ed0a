"""A user's own model and task may draw from Python's, NumPy's and torch's generators: nothing of it is lost."""

from __future__ import annotations

import numpy as np
import pytest
import raytx_unsteady
from test_resume import contents, directory, losses

import raytx.batches
import raytx_torch.engine
from raytx.testing import FakeEntryPoint, installed

SCHEDULE = {"train__steps": 8, "save__every": 4, "save__num_to_keep": None, "evaluate__every": 4}
NOISY = {"model__type": "unsteady", "model__noise": 0.05, **SCHEDULE}


@pytest.fixture(scope="module", autouse=True)
def plugin():
    with installed(FakeEntryPoint("raytx_unsteady", raytx_unsteady)):
        yield


def broken_and_whole(make, train_here):
    """Train, go back to step 4 and train on; return what is equal of both ends, by tensor, and what each logged."""
    whole, first = train_here(make)
    before = contents(directory(make, 8))
    (directory(make, 8)).rename(directory(make, 8).with_name("kept"))
    again, then = train_here(make)
    after = contents(directory(make, 8))
    assert whole.step == again.step == 8
    assert [row["step"] for row in then if row["kind"] == "resumed"] == [4]
    return {key: np.array_equal(value, after[key]) for key, value in before.items()}, first, then


def test_a_run_that_draws_from_every_generator_goes_on_to_the_same_bits(recipe, train_here):
    same, first, then = broken_and_whole(recipe("noisy", **NOISY), train_here)
    assert all(same.values())
    measured = [[row["loss"] for row in rows if row["kind"] == "eval" and row["step"] == 8] for rows in (first, then)]
    assert measured[0] == measured[1]


@pytest.mark.parametrize("places", [[raytx.batches], [raytx.batches, raytx_torch.engine]], ids=len)
def test_without_seeding_it_would_not(recipe, train_here, monkeypatch, places):
    """Or the test above would prove nothing. A forward pass after a seeded collation still has a known state."""
    for place in places:
        monkeypatch.setattr(place, "seed_generators", lambda *seed, **part: None)
    same, _, _ = broken_and_whole(recipe(f"noisy-unseeded-{len(places)}", **NOISY), train_here)
    assert not any(same[key] for key in same if key.endswith("exp_avg"))


def test_draws_are_the_same_on_any_number_of_ranks(recipe, train_here, run_ranks):
    _, alone = train_here(recipe("noisy-alone", **NOISY))
    for strategy in ({"type": "ddp"}, {"type": "deepspeed", "stage": 2}):
        name = f"noisy-{strategy['type']}"
        (shared,) = run_ranks([recipe(name, strategy=strategy, scaling__num_workers=2, **NOISY)])
        assert losses(shared) == pytest.approx(losses(alone), rel=1e-5)
        evaluated = [[row["loss"] for row in rows if row["kind"] == "eval"] for rows in (alone, shared)]
        assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)
