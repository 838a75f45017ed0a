"""The ledger tells what ranks were fed, and its audit what is wrong with that."""

from __future__ import annotations

import json

import numpy as np
import pytest

from raytx.components import Microbatch
from raytx.journal import FED, LEDGER, METRICS, Journal, rows
from raytx.ledger import STEPS, Ledger, audit

SAMPLES, BATCH, PER_EPOCH = 10, 4, 3


def order(epoch):
    return np.random.default_rng(epoch).permutation(SAMPLES).tolist()


def fed(last):
    """Return rows as a sound run of so many steps writes them; the third of an epoch is short."""
    places = [divmod(step, PER_EPOCH) for step in range(last)]
    return [
        {"kind": FED, "step": step + 1, "samples": order(epoch)[place * BATCH : (place + 1) * BATCH]}
        for step, (epoch, place) in enumerate(places)
    ]


def audited(tmp_path, found, *, saved=0):
    (tmp_path / "plan.json").write_text(json.dumps({"steps_per_epoch": PER_EPOCH, "num_samples": SAMPLES}))
    (tmp_path / LEDGER).write_text("".join(json.dumps(row) + "\n" for row in found))
    (tmp_path / "checkpoints" / f"step-{saved:08d}").mkdir(parents=True)
    return audit(tmp_path)


@pytest.mark.parametrize("last", [0, 2, 3, 8])
def test_a_sound_run_passes_in_the_midst_of_an_epoch_too(tmp_path, last):
    assert audited(tmp_path, fed(last), saved=last) == []


def test_a_repeated_sample_is_named_even_in_an_unfinished_epoch(tmp_path):
    found = fed(5)
    found[4]["samples"][0] = found[3]["samples"][0]
    assert audited(tmp_path, found) == [f"epoch 2 (steps 4 to 5): 1 of 10 samples repeated: {found[3]['samples'][0]}"]


def test_a_lost_sample_is_named_once_its_epoch_is_over(tmp_path):
    found = fed(3)
    gone = found[1]["samples"].pop()
    assert audited(tmp_path, found) == [f"epoch 1 (steps 1 to 3): 1 of 10 samples lost: {gone}"]


def test_a_step_without_a_row_is_told_and_so_are_its_samples(tmp_path):
    first, second = audited(tmp_path, [row for row in fed(4) if row["step"] != 2])
    assert first == "no row of 1 steps: 2"
    assert second.startswith("epoch 1 (steps 1 to 3): 4 of 10 samples lost: ")


def test_a_checkpoint_vouches_for_all_steps_before_it(tmp_path):
    assert "no row of 2 steps: 5, 6" in audited(tmp_path, fed(4), saved=6)


def test_an_unknown_sample_and_a_step_told_twice_are_named(tmp_path):
    found = fed(2)
    found[0]["samples"][0] = SAMPLES
    problems = audited(tmp_path, [*found, found[1]])
    assert problems == ["step 2: 2 rows", "epoch 1 (steps 1 to 2): 1 of 10 samples unknown: 10"]


def test_a_run_without_a_ledger_cannot_be_audited(tmp_path):
    (problem,) = audit(tmp_path)
    assert "train.ledger=true" in problem


class Ranks:
    """Stands for an engine of three ranks, of which the second shares the samples of the first."""

    def __init__(self, *others):
        self.others = others

    def gather(self, value):
        return [value, *self.others]


def microbatch(*samples):
    return Microbatch({}, weight=1.0, seed=0, samples=samples)


def test_rows_hold_what_each_replica_was_fed_and_no_padding():
    ledger, log = Ledger(speaks=True), []
    ledger.note(1, [microbatch(4, 5), microbatch()])
    ledger.note(2, [microbatch(6), microbatch(7)])
    ledger.tell(Ranks(None, {1: [0, 1], 2: [2, 3]}), log.append)
    assert [(row["step"], row["samples"]) for row in log] == [(1, [4, 5, 0, 1]), (2, [6, 7, 2, 3])]
    ledger.tell(Ranks(None, {}), log.append)
    assert len(log) == 2


def test_a_rank_keeps_a_bounded_number_of_steps():
    ledger = Ledger(speaks=True)
    for step in range(STEPS - 1):
        ledger.note(step, [microbatch(step)])
    assert not ledger.is_full
    ledger.note(STEPS, [microbatch(0)])
    assert ledger.is_full


def test_an_attempt_that_resumes_drops_the_rows_of_what_it_does_again(tmp_path):
    Journal(tmp_path).take([{"kind": "started", "step": 0}, *fed(5)])
    Journal(tmp_path).take([{"kind": "resumed", "step": 3, "checkpoint": "c"}, *fed(5)[3:]])
    assert [row["step"] for row in rows(tmp_path / LEDGER)] == [1, 2, 3, 4, 5]
    assert all(row["kind"] != FED for row in rows(tmp_path / METRICS))
