"""What a person reads of runs fits the width it is given, names what matters and survives any content."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from raytx import run
from raytx.listing import as_json, duration, show_comparison, show_details, show_list, show_verdict
from raytx.runs import compare, details, list_runs
from raytx.verify import Finding, Verdict

MakeRun = Callable[..., Path]


def shown(show: Callable[[Console], None], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 100, 160])
def test_a_list_has_a_line_for_each_run_and_no_line_is_wider_than_the_terminal(make_run: MakeRun, width: int) -> None:
    run_dir = make_run("one")
    make_run("two", done=7, saved=(4,), artifact=False)
    text = shown(lambda console: show_list(list_runs(run_dir.parent), console, where="there"), width)
    assert max(map(len, text.splitlines())) <= width
    if width >= 100:
        assert [line.split()[0] for line in text.splitlines()] == ["name", "two", "one"]
        assert "loss 5.200" in text
    if width == 160:
        assert "goes on from step 4" in text


def test_a_long_error_is_cut_to_the_line(make_run: MakeRun) -> None:
    run_dir = make_run("one", done=7, saved=(4,))
    with pytest.raises(ValueError, match="x"), run.at_work(run_dir, "training"):
        raise ValueError("x" * 300)
    text = shown(lambda console: show_list(list_runs(run_dir.parent), console, where="there"), 100)
    assert len(text.splitlines()) == 2
    assert "xxx…" in text


def test_where_no_room_is_left_what_went_wrong_stands_below_the_list(make_run: MakeRun) -> None:
    run_dir = make_run("a-name-so-long-that-it-leaves-no-room", done=7, saved=(4,))
    (run_dir / "plan.json").write_text("{")
    text = shown(lambda console: show_list(list_runs(run_dir.parent), console, where="there"), 80)
    assert "a-name-so-long-that-it-leaves-no-room: plan.json is damaged" in text


def test_an_empty_list_says_where_it_looked() -> None:
    assert shown(lambda console: show_list([], console, where="/runs"), 80) == "no runs below /runs\n"


@pytest.mark.parametrize("width", [100, 160])
def test_all_of_a_run_is_shown(make_run: MakeRun, width: int) -> None:
    run_dir = make_run("one")
    with run.at_work(run_dir, "training"):
        pass
    text = shown(lambda console: show_details(details(run_dir), console), width)
    assert max(map(len, text.splitlines()[3:])) <= width
    for words in ("8 of 8 steps", "best loss 5.200 at step 8", "1 on alpha, 1 on beta", "newest, best", "1.00e-07"):
        assert words in text
    for title in ("plan", "attempts", "commands", "checkpoints", "artifacts", "what came of what", "software"):
        assert f"\n{title}\n" in text


def test_what_runs_wrote_is_never_taken_for_markup(make_run: MakeRun) -> None:
    run_dir = make_run("one", data__path="[/nonsense]rows", done=7, saved=(4,))
    with pytest.raises(ValueError, match="bad"), run.at_work(run_dir, "training"):
        raise ValueError("[/bad] [red]markup")
    assert "[/nonsense]rows" in shown(lambda console: show_details(details(run_dir), console), 160)
    assert "[/bad] [red]markup" in shown(lambda c: show_list(list_runs(run_dir), c, where=""), 200)
    assert "[/nonsense]rows" in shown(lambda c: show_comparison(compare(run_dir, make_run("two")), c), 160)


def test_a_broken_run_is_shown_as_far_as_it_can_be_read(make_run: MakeRun) -> None:
    run_dir = make_run()
    (run_dir / "plan.json").write_text("[]")
    text = shown(lambda console: show_details(details(run_dir), console), 100)
    assert "broken: plan.json is damaged" in text
    assert "step-00000008" in text


def test_keys_that_make_another_run_are_marked(make_run: MakeRun) -> None:
    first, second = make_run("a"), make_run("b", optim__lr=0.1, save__every=3)
    lines = shown(lambda console: show_comparison(compare(first, second), console), 100).splitlines()
    assert "two different runs" in lines[0]
    assert [line.split()[:2] for line in lines if line.startswith(("optim", "save"))] == [
        ["optim.lr", "*"], ["save.every", "-"],
    ]  # fmt: skip
    same = shown(lambda console: show_comparison(compare(first, first), console), 100)
    plan = json.loads((first / "plan.json").read_text())
    third = make_run("c")
    (third / "plan.json").write_text(json.dumps(plan | {"content": "of other files"}))
    others = shown(lambda console: show_comparison(compare(first, third), console), 100)
    assert "two different runs" in others
    assert "prepared data *" in others
    assert "each could go on as the other" in same


def test_a_verdict_is_a_line_for_the_run_and_one_for_each_finding() -> None:
    verdict = Verdict("/runs/a", [Finding("f", "gone")], [Finding("g", "odd")], checkpoints=1, artifacts=2, steps=1)
    assert shown(lambda console: show_verdict(verdict, console), 30).splitlines() == [
        "1 problem  /runs/a  1 checkpoint, 2 artifacts, 1 step", "  f: gone", "  note g: odd",
    ]  # fmt: skip


def test_json_is_valid_also_where_a_loss_was_not_finite() -> None:
    assert json.loads(as_json([Verdict("/a"), {"loss": math.nan, "at": (1, math.inf)}]))[1] == {
        "loss": None, "at": [1, None],
    }  # fmt: skip


def test_durations_are_told_in_their_largest_unit() -> None:
    assert [duration(s) for s in (0, 59.4, 61, 3700, 90000, 86400 * 30)] == [
        "0 s",
        "59 s",
        "1 min",
        "1.0 h",
        "1 d",
        "30 d",
    ]
