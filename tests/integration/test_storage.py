"""Storage that gives out while saving: one clear error, nothing half-written, and the run goes on afterwards."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace

import pytest
from rich.console import Console

from raytx import checkpoint, worker
from raytx.errors import RaytxError, TrainingError
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


class Killed(BaseException):
    """Stands for the process ending at once: nothing after it runs."""


@pytest.mark.parametrize("moment", ["staged", "tensors written", "golden written", "manifest written", "retaining"])
def test_a_save_that_is_killed_at_any_moment_leaves_the_checkpoint_before_it(
    recipe, train_here, monkeypatch, tmp_path, moment
):
    run = recipe(
        "killed", storage_path=str(tmp_path), train__steps=6, save__every=2, save__num_to_keep=1, evaluate__every=2
    )
    places = {
        "staged": (checkpoint, "_write_tensors"),
        "tensors written": (checkpoint, "_seal"),
        "golden written": (checkpoint.shutil, "copytree"),
        "manifest written": (checkpoint, "sync_directory"),
        "retaining": (checkpoint, "retain"),
    }
    owner, name = places[moment]
    original, calls = getattr(owner, name), []

    def killed(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise Killed
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            train_here(run)
    run_dir = resolve(run).run_dir
    survivor = checkpoint.newest(run_dir)
    assert survivor is not None
    assert survivor.step == (4 if moment in {"manifest written", "retaining"} else 2)
    final, log = train_here(run)
    assert final.step == 6
    assert [row["step"] for row in log if row["kind"] == "resumed"] == [survivor.step]
    assert checkpoint.complete(run_dir)[0].name == "step-00000006"
    assert not list((run_dir / "checkpoints").glob(".*"))


def spoil(directory):
    path = next(directory.glob("weights-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_never_counts_among_those_that_are_kept(recipe, train_here, tmp_path):
    run = recipe("kept", storage_path=str(tmp_path), train__steps=8, save__every=2, save__num_to_keep=None)
    train_here(run)
    checkpoints = resolve(run).run_dir / "checkpoints"
    spoil(checkpoints / "step-00000008")
    shutil.rmtree(checkpoints / "step-00000006")
    train_here(run.override({"save.num_to_keep": 1}))
    assert [path.name for path in checkpoint.complete(resolve(run).run_dir)] == ["step-00000008"]
    assert checkpoint.damage(checkpoints / "step-00000008") is None
    assert (checkpoints / "damaged-step-00000008").is_dir()


def test_where_the_best_checkpoint_is_damaged_the_best_of_the_others_is_chosen(recipe, train_here, tmp_path):
    values = {
        "train__steps": 8,
        "evaluate__every": 2,
        "save__every": 2,
        "save__num_to_keep": None,
        "save__keep": "best",
    }
    run = recipe("next-best", storage_path=str(tmp_path), **values)
    train_here(run)
    run_dir = resolve(run).run_dir
    losses = {path.name: checkpoint.Checkpoint(path).state.metrics["loss"] for path in checkpoint.complete(run_dir)}
    best, second, *_ = sorted(losses, key=losses.get)
    assert checkpoint.chosen(run_dir).directory.name == best
    spoil(run_dir / "checkpoints" / best)
    assert checkpoint.chosen(run_dir).directory.name == second


def test_a_best_value_of_another_metric_is_forgotten(recipe, train_here, tmp_path):
    values = {
        "train__steps": 8,
        "evaluate__every": 2,
        "save__every": 4,
        "save__num_to_keep": None,
        "save__keep": "best",
    }
    run = recipe("other-metric", storage_path=str(tmp_path), **values)
    train_here(run)
    shutil.rmtree(resolve(run).run_dir / "checkpoints" / "step-00000008")
    state, _ = train_here(run.override({"evaluate.metric": "perplexity"}))
    assert state.metric == "perplexity min"
    assert state.best == state.metrics["perplexity"]


def test_a_run_whose_data_changed_is_refused(recipe, corpus, tmp_path):
    from raytx import run as run_directory
    from raytx.errors import DataError

    data = tmp_path / "data"
    shutil.copytree(corpus, data)
    values = {"data__path": str(data), "train__steps": 4, "storage_path": str(tmp_path / "runs")}
    plan, _ = prepare(resolve(recipe("changed", **values)), Console(quiet=True))
    with run_directory.own(plan):
        run_directory.record(plan)
        worker.train(plan, session([]))
        run_directory.record(plan)
    (data / "another.txt").write_text("a new document of some words\n" * 20)
    later, _ = prepare(resolve(recipe("changed", **values)), Console(quiet=True))
    with run_directory.own(later), pytest.raises(DataError, match="has learned from other data"):
        run_directory.record(later)


@pytest.mark.parametrize(
    "values", [{"save__keep": "best"}, {"evaluate__every": 2}, {"evaluate__metric": "perplexity"}], ids=str
)
def test_keys_that_need_held_out_samples_are_refused_where_there_are_none(recipe, values):
    run = recipe("nothing-held-out", **values).override({"data.split.test": 0.0})
    with pytest.raises(RaytxError, match="needs held-out samples"):
        prepare(resolve(run), Console(quiet=True))
