"""Checkpoints and data that are damaged, gone or others than before: what a run makes of them."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from rich.console import Console

from raytx import checkpoint, worker
from raytx.errors import RaytxError, TrainingError
from raytx.plan import resolve
from raytx.prepare import prepare


def session(log):
    return worker.Session(rank=0, log=log.append, flush=lambda: None, report=lambda metrics: None)


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
    with run_directory.own(later), pytest.raises(DataError, match="has learned from other data") as error:
        run_directory.record(later)
    assert "software" not in str(error.value)
    newer = replace(later, version="9.9")
    with run_directory.own(newer), pytest.raises(DataError, match=r"and the software, .*raytx .* is 9.9 now"):
        run_directory.record(newer)


def test_a_run_whose_data_is_prepared_anew_by_another_version_to_the_same_samples_goes_on(
    recipe, tmp_path, monkeypatch
):
    from raytx import prepare as preparing
    from raytx import run as run_directory

    run = recipe("upgraded", train__steps=4, storage_path=str(tmp_path / "runs"))
    plan, _ = prepare(resolve(run), Console(quiet=True))
    with run_directory.own(plan):
        run_directory.record(plan)
        worker.train(plan, session([]))
    monkeypatch.setattr(preparing, "__version__", "9.9")
    later, _ = prepare(resolve(run), Console(quiet=True))
    assert later.prepared != plan.prepared
    with run_directory.own(later):
        run_directory.record(later)


@pytest.mark.parametrize(
    "values", [{"save__keep": "best"}, {"evaluate__every": 2}, {"evaluate__metric": "perplexity"}], ids=str
)
def test_keys_that_need_held_out_samples_are_refused_where_there_are_none(recipe, values):
    run = recipe("nothing-held-out", **values).override({"data.split.test": 0.0})
    with pytest.raises(RaytxError, match="needs held-out samples"):
        prepare(resolve(run), Console(quiet=True))


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(recipe, tmp_path):
    plan, _ = prepare(resolve(recipe("vanished", storage_path=str(tmp_path), train__steps=4)), Console(quiet=True))
    with pytest.raises(TrainingError, match="held a checkpoint of step 2, and now none that is whole"):
        worker.train(plan, replace(session([]), saved=2))
    assert not checkpoint.complete(plan.run_dir)


def test_an_order_in_the_midst_of_an_evaluation_is_obeyed_and_the_evaluation_done_later(recipe, tmp_path):
    run = recipe("broken-into", storage_path=str(tmp_path), train__steps=6, save__every=None)
    plan, _ = prepare(resolve(run), Console(quiet=True))
    log: list[dict] = []

    def order():
        evaluating = any(row["kind"] == "step" and row["step"] == 6 for row in log)
        return worker.Order(1, "stop") if evaluating else worker.Order()

    stopped = worker.train(plan, replace(session(log), order=order))
    assert stopped.step == 6
    assert not checkpoint.newest(plan.run_dir).state.metrics
    again: list[dict] = []
    final = worker.train(plan, session(again))
    assert [row["kind"] for row in again if row["kind"] in {"resumed", "step", "eval", "checkpoint"}] == [
        "resumed",
        "eval",
        "checkpoint",
    ]
    saved = checkpoint.newest(plan.run_dir)
    assert saved.state.metrics == final.metrics
    assert [path.name for path in (plan.run_dir / "checkpoints").iterdir()] == ["step-00000006"]


def test_an_order_to_save_in_the_midst_of_an_evaluation_does_not_wait_for_its_end(recipe, tmp_path):
    values = {"train__steps": 6, "save__every": None, "save__background": False, "evaluate__every": 3}
    run = recipe("saved-meanwhile", storage_path=str(tmp_path), **values)
    plan, _ = prepare(resolve(run), Console(quiet=True))
    log: list[dict] = []

    def order():
        return worker.Order(1, "save") if any(row.get("step") == 3 for row in log) else worker.Order()

    final = worker.train(plan, replace(session(log), order=order))
    kinds = [(row["kind"], row["step"]) for row in log if row["kind"] in {"eval", "checkpoint"}]
    assert kinds == [("checkpoint", 3), ("eval", 3), ("eval", 6), ("checkpoint", 6)]
    assert final.step == 6


def test_an_order_that_was_obeyed_is_not_obeyed_again_in_the_next_evaluation(recipe, tmp_path):
    values = {"train__steps": 6, "save__every": None, "save__background": False, "evaluate__every": 6}
    run = recipe("obeyed", storage_path=str(tmp_path), **values)
    plan, _ = prepare(resolve(run), Console(quiet=True))
    log: list[dict] = []

    def order():
        return worker.Order(1, "save") if any(row.get("step") == 2 for row in log) else worker.Order()

    worker.train(plan, replace(session(log), order=order))
    kinds = [(row["kind"], row["step"]) for row in log if row["kind"] in {"eval", "checkpoint"}]
    assert len(kinds) == 3, "one save that was ordered, and one at the end"
    assert kinds[1:] == [("eval", 6), ("checkpoint", 6)]
