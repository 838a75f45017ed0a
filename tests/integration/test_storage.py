"""Storage that gives out while saving: one clear error, nothing half-written, and the run goes on afterwards."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace

import pytest
from rich.console import Console

from raytx import checkpoint, worker
from raytx.errors import TrainingError
from raytx.plan import resolve
from raytx.prepare import prepare


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of one mebibyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"mounting a small file system is not allowed here: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def session(log):
    return worker.Session(rank=0, log=log.append, flush=lambda: None, report=lambda metrics: None)


def test_a_full_disk_stops_with_one_error_and_leaves_the_last_checkpoint_whole(recipe, small_disk):
    run = recipe("full", storage_path=str(small_disk), save__every=1, save__num_to_keep=None, train__steps=6)
    elsewhere, _ = prepare(resolve(recipe("full-elsewhere", train__steps=6)), Console(quiet=True))
    plan = replace(resolve(run), prepared=elsewhere.prepared, steps=6, steps_per_epoch=elsewhere.steps_per_epoch)
    with pytest.raises(TrainingError) as full:
        worker.train(plan, session([]))
    assert "No space left" in str(full.value)
    assert "goes on from the last complete checkpoint" in str(full.value)
    left = checkpoint.complete(plan.run_dir)
    assert left
    assert [checkpoint.damage(path) for path in left] == [None] * len(left)
    assert not list((plan.run_dir / "checkpoints").glob(".step-*"))
    for path in left[1:]:
        shutil.rmtree(path)
    log: list[dict] = []
    final = worker.train(replace(plan, recipe=run.override({"save.every": None, "save.num_to_keep": 1})), session(log))
    assert final.step == 6
    assert any(row["kind"] == "resumed" for row in log)
