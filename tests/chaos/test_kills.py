"""A run that is killed at any moment goes on to the same bits, and leaves nothing behind; the short form."""

from __future__ import annotations

import random

import audit
import pytest
from job import Job
from killer import hunt, plan_shots

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

RUNS = {
    "single": [("driver", "save"), ("rank", "restart"), ("rank", "any")],
    "ddp": [("rank", "any"), ("worker", "any")],
    "fsdp": [("rank", "save"), ("rank", "step")],
    "zero 2": [("raylet", "any"), ("rank", "evaluation")],
    "zero 3": [("driver", "start"), ("rank", "save")],
    "3d 1x2x2": [("rank", "any"), ("rank", "restart")],
}
"""What is killed, and during what, by strategy."""
SHORTEST = ("single", "ddp")


@pytest.mark.parametrize(
    "strategy", [name if name in SHORTEST else pytest.param(name, marks=pytest.mark.long) for name in RUNS]
)
def test_a_killed_run_ends_in_the_bits_of_the_unbroken_one(home, unbroken, strategy):
    expected = unbroken(strategy)
    job = Job(home, f"killed-{strategy.replace(' ', '-')}", strategy)
    before = audit.shared_memory()
    found = hunt(job, plan_shots(random.Random(strategy), RUNS[strategy]))
    print(*(hit.to_dict() for hit in found.hits), sep="\n")
    assert found.problems == []
    assert audit.losses(job, expected) == []
    assert audit.leftovers(job, before) == []
    assert found.hits
