"""Runs are told from their directories alone: listed by activity, in full, compared; broken ones are told as broken."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytx import run, runs, status
from raytx.errors import RunError, TrainingError
from raytx.files import inventory
from raytx.runs import attempts, compare, details, directories, find, list_runs, summary

MakeRun = Callable[..., Path]


def attempt(run_dir: Path, error: Exception | None = None) -> None:
    """Leave what a command that held the run leaves."""
    with contextlib.suppress(TrainingError), run.at_work(run_dir, "training"):
        if error:
            raise error


def search(make_run: MakeRun) -> Path:
    """Make a search of which one trial has finished, one was stopped and one is yet to come."""
    trial = make_run("hunt/trials/trial_0", artifact=False)
    (trial / "trial.json").write_text(json.dumps({"metrics": {"loss": 5.2}, "steps": 8}))
    make_run("hunt/trials/trial_1", done=5, saved=(4,), artifact=False)
    (trial.parent.parent / "recipe.yaml").write_text("search: {samples: 3}")
    return trial.parent.parent


# ---------------------------------------------------------------------------------------------------------- a line


def test_a_finished_run_in_a_line(make_run: MakeRun) -> None:
    told = summary(make_run())
    assert (told.state, told.detail, told.step, told.steps, told.saved) == ("finished", "", 8, 8, 8)
    assert (told.metric, told.last, told.best, told.best_step) == ("loss", 5.2, 5.2, 8)
    assert (told.strategy, told.workers) == ("ddp", 2)
    assert told.bytes == sum(path.stat().st_size for path in Path(told.directory).rglob("*") if path.is_file())


def test_a_run_that_was_cut_short_says_where_it_goes_on(make_run: MakeRun) -> None:
    told = summary(make_run("cut", done=7, saved=(4,)))
    assert (told.state, told.step, told.saved, told.detail) == ("stopped", 7, 4, "goes on from step 4")
    lost = summary(make_run("lost", done=3, saved=()))
    assert (lost.state, lost.detail) == ("stopped", "goes on from the beginning: nothing was saved")


def test_a_failed_run_says_why_in_a_line_until_a_command_ends_well(make_run: MakeRun) -> None:
    run_dir = make_run(done=6, saved=(4,), artifact=False)
    attempt(run_dir, TrainingError("step 6: loss nan\nmore words"))
    assert (summary(run_dir).state, summary(run_dir).detail) == ("failed", "step 6: loss nan; goes on from step 4")
    with run.at_work(run_dir, "exporting"):
        pass  # that an export went well mends nothing
    assert summary(run_dir).state == "failed"
    attempt(run_dir)
    assert summary(run_dir).state == "stopped"


def test_an_interrupted_run_is_stopped_not_failed(make_run: MakeRun) -> None:
    run_dir = make_run(done=6, saved=(4,), artifact=False)
    with pytest.raises(KeyboardInterrupt), run.at_work(run_dir, "training"):
        raise KeyboardInterrupt
    assert (summary(run_dir).state, summary(run_dir).detail) == ("stopped", "interrupted; goes on from step 4")


def test_a_killed_run_says_so(make_run: MakeRun) -> None:
    run_dir = make_run(done=6, saved=(4,), artifact=False)
    status._write(run_dir, [{"host": socket.gethostname(), "pid": 1, "doing": "training", "started": 1.0}])
    assert (summary(run_dir).state, summary(run_dir).detail) == ("stopped", "killed; goes on from step 4")


def test_a_finished_run_whose_last_command_failed_is_finished_and_says_so(make_run: MakeRun) -> None:
    run_dir = make_run()
    attempt(run_dir, TrainingError("the export died"))
    told = summary(run_dir)
    assert (told.state, told.detail) == ("finished", "its last command failed: the export died")


def test_a_run_at_work_names_its_process(make_run: MakeRun) -> None:
    run_dir = make_run(done=6, saved=(4,))
    with run.at_work(run_dir, "training"):
        told = summary(run_dir)
        assert (told.state, f"pid {os.getpid()} on" in told.detail) == ("running", True)
    with run.at_work(run_dir, "exporting"):
        assert summary(run_dir).detail.startswith("exporting, pid")


def test_a_run_of_another_machine_goes_on_while_it_writes(make_run: MakeRun) -> None:
    run_dir = make_run(done=6, saved=(4,))
    turn = {"host": "elsewhere", "pid": 7, "doing": "training", "started": time.time()}
    (run_dir / "status.json").write_text(json.dumps({"turns": [turn]}))
    assert summary(run_dir).detail == "pid 7 on elsewhere, by what it writes"
    for path in [run_dir / "status.json", *run_dir.iterdir()]:
        os.utime(path, (time.time() - 600,) * 2)
    assert summary(run_dir).state == "stopped"


def test_the_newest_metric_is_found_without_reading_a_long_journal(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(steps=500, done=490, saved=(100, 200), artifact=False)
    assert summary(run_dir).last == 6 - 200 / 10
    monkeypatch.setattr(runs, "TAIL_BYTES", 1000)  # the evaluation is further back: the checkpoint knows it too
    told = summary(run_dir)
    assert (told.step, told.last) == (490, 6 - 200 / 10)


def test_the_best_of_another_metric_is_not_shown(make_run: MakeRun) -> None:
    run_dir = make_run()
    plan = json.loads((run_dir / "plan.json").read_text())
    (run_dir / "plan.json").write_text(json.dumps(plan | {"metric": "perplexity"}))
    assert summary(run_dir).best is None


@pytest.mark.parametrize("content", ["{", "[]", '{"recipe": 3, "layout": {}}', "\udcff", "null"])
@pytest.mark.parametrize("name", ["plan.json", "checkpoints/step-00000008/state.json"])
def test_a_broken_run_is_told_as_broken_and_hides_no_other(make_run: MakeRun, name: str, content: str) -> None:
    whole, broken = make_run("whole"), make_run("broken")
    (broken / name).write_bytes(content.encode(errors="surrogateescape"))
    told = {one.name: one.state for one in list_runs(whole.parent)}
    assert told == {"whole": "finished", "broken": "broken"}
    assert isinstance(details(broken), dict)


def test_rubbish_in_a_journal_keeps_nothing_from_being_told(make_run: MakeRun) -> None:
    run_dir = make_run()
    with open(run_dir / "metrics.jsonl", "ab") as file:
        file.write(b'3\n[]\nnull\n{"kind": "step", "st')
    assert summary(run_dir).state == "finished"
    assert details(run_dir)["plan"]["steps"] == 8


# ---------------------------------------------------------------------------------------------------------- a list


def test_runs_are_listed_by_activity_and_other_directories_are_not_runs(make_run: MakeRun) -> None:
    old, new = make_run("old"), make_run("new")
    for path in [old, *old.iterdir()]:
        os.utime(path, (time.time() - 600,) * 2)
    (new.parent / "notes").mkdir()
    (new.parent / "file").write_text("x")
    assert [told.name for told in list_runs(new.parent)] == ["new", "old"]


def test_a_list_of_hundreds_reads_little(make_run: MakeRun) -> None:
    first = make_run("run000")
    for number in range(1, 300):
        shutil.copytree(first, first.with_name(f"run{number:03}"))
    started = time.process_time()
    assert len(list_runs(first.parent)) == 300
    assert time.process_time() - started < 3


def test_looking_changes_nothing_and_asks_for_no_right_to_write(make_run: MakeRun) -> None:
    run_dir = make_run()
    attempt(run_dir)
    before = {path: path.stat().st_mtime_ns for path in run_dir.parent.rglob("*")}, inventory(run_dir.parent)
    list_runs(run_dir.parent)
    details(run_dir)
    compare(run_dir, run_dir)
    assert ({path: path.stat().st_mtime_ns for path in run_dir.parent.rglob("*")}, inventory(run_dir.parent)) == before


def test_nothing_is_listed_where_no_run_was_ever_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list_runs() == []
    with pytest.raises(RunError, match="no such directory"):
        list_runs(tmp_path / "mistyped")


def test_a_search_is_listed_with_its_trials_and_its_directory_lists_them(make_run: MakeRun) -> None:
    hunt = search(make_run)
    (told,) = list_runs(hunt.parent)
    assert (told.kind, told.state, told.step, told.steps, told.best) == ("search", "stopped", 2, 3, 5.2)
    assert told.trials == {"finished": 1, "stopped": 1}
    assert sorted(one.name for one in list_runs(hunt)) == ["trial_0", "trial_1"]
    written = [{"id": "trial_1", "state": "failed", "metrics": None, "error": "x", "values": {"optim.lr": 0.1}}]
    (hunt / "trials.json").write_text(json.dumps(written))
    assert summary(hunt).state == "finished"
    assert summary(hunt).trials == {"finished": 1, "failed": 1}
    assert [trial.get("values") for trial in details(hunt)["trials"]] == [None, {"optim.lr": 0.1}]


# ----------------------------------------------------------------------------------------------------------- by name


def test_a_run_is_found_by_name_or_directory_and_the_nearest_is_suggested(make_run: MakeRun) -> None:
    run_dir = make_run("quickstart")
    assert find("quickstart", run_dir.parent) == find(str(run_dir)) == run_dir
    with pytest.raises(RunError, match="Did you mean 'quickstart'"):
        find("quikstart", run_dir.parent)
    with pytest.raises(RunError, match="There are no runs"):
        find("quikstart", run_dir.parent / "elsewhere")


def test_a_run_directory_stands_for_itself(make_run: MakeRun) -> None:
    run_dir = make_run()
    assert directories(run_dir) == [run_dir]


# ----------------------------------------------------------------------------------------------------------- in full


def test_attempts_are_told_with_place_length_and_end() -> None:
    turns: list[dict[str, Any]] = [
        {"started": 0.0, "pid": 9, "remarks": [{"time": 14.0, "text": "worker 1 failed"}]},
        {"started": 20.0, "ended": 40.0, "error": "disk full\nat the end"},
    ]
    first, second, third = attempts(
        [
            {"kind": "placed", "step": 0, "nodes": ["a", "a"], "time": 10.0},
            {"kind": "started", "step": 0, "time": 10.0},
            {"kind": "step", "step": 4, "time": 14.0},
            {"kind": "resumed", "step": 4, "time": 25.0},
            {"kind": "placed", "step": 4, "nodes": ["a", "b", "b"], "time": 25.0},
            {"kind": "step", "step": 9, "time": 30.0},
            {"kind": "resumed", "step": 8, "time": 50.0},
            {"kind": "remark", "text": "checkpoint step-9 is damaged", "time": 51.0},
        ],
        turns,
    )
    assert (first["from"], first["to"], first["since"], first["until"], first["workers"]) == (0, 4, 10.0, 14.0, 2)
    assert (second["from"], second["to"], second["nodes"]) == (4, 9, {"a": 1, "b": 2})
    assert (third["from"], third["workers"]) == (8, None)
    assert [one["told"] for one in (first, second, third)] == [
        ["worker 1 failed", "its command was killed (pid 9)"], ["disk full"], ["checkpoint step-9 is damaged"],
    ]  # fmt: skip


def test_commands_are_told_with_their_outcome(make_run: MakeRun) -> None:
    run_dir = make_run()
    attempt(run_dir)
    attempt(run_dir, TrainingError("loss nan"))
    status._write(run_dir, [*status.turns(run_dir), {"host": "h", "pid": 1, "started": 1.0}])
    assert [turn["outcome"] for turn in details(run_dir)["turns"]] == ["done", "loss nan", "killed"]
    with run.at_work(run_dir, "training"):
        assert [turn["outcome"] for turn in details(run_dir)["turns"]][2:] == ["killed", "at work"]


def test_checkpoints_say_why_they_stay(make_run: MakeRun) -> None:
    run_dir = make_run(steps=12, saved=(4, 8, 12))
    newest = run_dir / "checkpoints" / "step-00000012" / "state.json"
    newest.write_text(json.dumps(json.loads(newest.read_text()) | {"best_step": 4}))
    kept = {one["step"]: one["kept"] for one in details(run_dir)["checkpoints"]}
    assert kept == {12: ["newest"], 8: ["one of the newest 2"], 4: ["best"]}


def test_lineage_leads_from_artifact_to_rows_and_says_what_is_gone(make_run: MakeRun) -> None:
    run_dir = make_run(data__path="rows.txt")
    first, second, third, fourth = details(run_dir)["lineage"]
    assert first == "artifacts/hf <- checkpoints/step-00000008 <- plan ab12"
    assert second.startswith("plan ")
    assert third == "weights <- decoder, random weights of seed 0"
    assert fourth.endswith("0badc0de <- text-files, rows.txt")
    shutil.rmtree(run_dir / "checkpoints" / "step-00000008")
    shutil.rmtree(run_dir.parent / ".cache")
    assert "(no longer there)" in details(run_dir)["lineage"][0]
    assert "made again when it is needed" in details(run_dir)["lineage"][3]


def test_the_base_of_an_adapter_is_named() -> None:
    model = {"type": "hf", "path": "org/base", "revision": "abc", "adapter": {"type": "lora", "r": 8}}
    assert runs.origin(model, seed=0) == "hf, org/base at abc with lora adapters on it"


# ---------------------------------------------------------------------------------------------------------- compared


def test_what_differs_is_told_and_what_would_make_another_run_is_marked(make_run: MakeRun) -> None:
    first = make_run("a")
    second = make_run("b", optim__lr=0.1, scaling__num_workers=1, save__every=3)
    found = compare(first, second)
    assert found["recipe"] == {"optim.lr": [3e-4, 0.1], "save.every": [None, 3], "scaling.num_workers": [2, 1]}
    assert found["another_run"] == ["optim.lr"]
    assert (found["data"], found["plugins"], found["software"]) == ({}, {}, {})
    assert found["results"]["held-out loss"] == [5.2, 5.2]
    assert found["results"]["tokens/s (median)"] == [100.0, 100.0]


def test_runs_on_other_software_and_data_differ_there(make_run: MakeRun) -> None:
    first, second = make_run("a"), make_run("b")
    (second / "environment.json").write_text(json.dumps({"python": "3.12.1", "packages": {"torch": "2.14.0"}}))
    plan = json.loads((second / "plan.json").read_text())
    (second / "plan.json").write_text(json.dumps(plan | {"num_samples": 20, "plugins": {"raytx_torch": "0.2.0"}}))
    found = compare(first, second)
    assert found["software"] == {"python": ["3.11.7", "3.12.1"], "packages.torch": ["2.13.0", "2.14.0"]}
    assert found["data"] == {"training samples": [16, 20]}
    assert found["plugins"] == {"raytx_torch": ["0.1.0", "0.2.0"]}


def test_what_has_no_plan_cannot_be_compared(make_run: MakeRun) -> None:
    run_dir, hunt = make_run(), search(make_run)
    with pytest.raises(RunError, match="is a search; compare its trials"):
        compare(run_dir, hunt)
    (run_dir / "plan.json").write_text("{")
    with pytest.raises(RunError, match=r"plan\.json: cannot be read"):
        compare(run_dir, run_dir)
