"""The audit reports what it is there for: runs of a raytx with a bug planted in it, and things left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import audit
import pytest
from job import MARK, Job
from killer import Shot, hunt

PLANTED = Path(__file__).parent / "planted"
SHORT = {"train.steps": 12}
FINDS = {
    "skips_a_batch": "step 12 was fed samples",
    "forgets_the_seeds": "step 12: {",
    "forgets_the_moments": "|exp_avg_sq differs",
    "writes_rows_twice": "metrics.jsonl has step rows of",
}
"""What the audit must say of each bug."""


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize(
    "bug", ["forgets_the_seeds", *(pytest.param(bug, marks=pytest.mark.long) for bug in FINDS if "seeds" not in bug)]
)
def test_a_planted_bug_is_reported(home, unbroken, bug):
    job = Job(home, bug.replace("_", "-"), "single", SHORT, plugins=[PLANTED / f"{bug}.py"])
    found = hunt(job, [Shot("rank", step=9)])
    assert found.problems == []
    assert [hit.shot.kind for hit in found.hits] == ["rank"]
    lost = audit.losses(job, unbroken("single", SHORT))
    assert any(FINDS[bug] in line for line in lost), lost


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.long
def test_an_unbroken_run_has_lost_nothing_beside_itself(unbroken):
    job = unbroken("single", SHORT)
    assert audit.losses(job, job) == []


def test_a_store_that_lacks_the_last_checkpoint_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYTX_CACHE", str(tmp_path / "cache"))
    job = Job(tmp_path, "lacking", "single", store=f"file://{tmp_path}/store")
    rubbish = tmp_path / "store" / "lacking" / "checkpoints" / "step-00000004.0000000000000001000001" / "state.json"
    rubbish.parent.mkdir(parents=True)
    rubbish.write_text("{}")
    assert audit.store(Job(tmp_path, "elsewhere", "single")) == []
    assert "the last checkpoint in the store is None" in audit.store(job)[-1]


def test_a_process_that_stays_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "LINGER_S", 0.5)
    job = Job(tmp_path, "stays", "single")
    process = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=os.environ | {MARK: job.mark}
    )
    try:
        assert any(f"process {process.pid} is left" in line for line in audit.leftovers(job, audit.shared_memory()))
    finally:
        process.kill()
        process.communicate()
    assert audit.leftovers(job, audit.shared_memory()) == []


def test_shared_memory_and_half_written_checkpoints_that_stay_are_reported(tmp_path):
    job = Job(tmp_path, "rubbish", "single")
    before = audit.shared_memory()
    (job.run_dir / "checkpoints" / ".step-00000004.staging").mkdir(parents=True)
    left = Path("/dev/shm") / f"raytx-chaos-{os.getpid()}"
    left.write_bytes(b"left")
    try:
        found = audit.leftovers(job, before)
    finally:
        left.unlink()
    assert found == [f"rubbish: /dev/shm/{left.name} is left", "rubbish: .step-00000004.staging is left"]
