"""Whatever is damaged, missing or contradictory in a run is found and named; what is well is left alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytx import run, verify
from raytx.files import inventory, read_sealed, write_sealed
from raytx.verify import Verdict, hashed_bytes, verifiable

MakeRun = Callable[..., Path]


def problems(run_dir: Path) -> list[str]:
    return [str(finding) for finding in verify.verify(run_dir).problems]


def notes(run_dir: Path) -> list[str]:
    return [str(finding) for finding in verify.verify(run_dir).notes]


def rewrite(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("".join(line + "\n" for line in change(path.read_text().splitlines())))


def reseal(directory: Path, manifest: str) -> None:
    """Let a manifest agree with its directory again, as someone who tampers would."""
    told = read_sealed(directory / manifest)
    write_sealed(directory / manifest, told | {"files": inventory(directory, exclude=frozenset({manifest}))})


def test_a_sound_run_has_no_problem_and_is_left_as_it_was(make_run: MakeRun) -> None:
    run_dir = make_run()
    before = inventory(run_dir.parent)
    assert verify.verify(run_dir) == Verdict(str(run_dir), checkpoints=2, artifacts=1, steps=8)
    assert inventory(run_dir.parent) == before


def test_one_flipped_bit_in_any_hashed_file_is_found_and_the_file_is_named(make_run: MakeRun) -> None:
    run_dir = make_run()
    hashed = [
        path
        for path in [*run_dir.rglob("*"), *(run_dir.parent / ".cache").rglob("*")]
        if path.is_file() and path.parent != run_dir and path.name not in ("manifest.json", "artifact.json")
    ]
    assert len(hashed) == 2 * 3 + 1 + 2
    for path in hashed:
        whole = path.read_bytes()
        path.write_bytes(whole[:7] + bytes([whole[7] ^ 1]) + whole[8:])
        name = str(path.relative_to(run_dir) if path.is_relative_to(run_dir) else path)
        assert problems(run_dir) == [f"{name}: its SHA-256 differs from the manifest"]
        path.write_bytes(whole)
    assert problems(run_dir) == []


@pytest.mark.parametrize("name", ["checkpoints/step-00000004/manifest.json", "artifacts/hf/artifact.json"])
def test_no_bit_of_a_manifest_can_flip_unnoticed(make_run: MakeRun, name: str) -> None:
    run_dir = make_run()
    path = run_dir / name
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 400)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            same = json.loads(path.read_bytes()) == json.loads(whole)  # 1e-7 is 1E-7
        except ValueError:
            same = False
        assert same or any(told.startswith(name.rpartition("/")[0]) for told in problems(run_dir)), place


def test_missing_short_and_foreign_files_are_told_apart(make_run: MakeRun) -> None:
    run_dir = make_run()
    weights = "weights-00000-00000.safetensors"
    (run_dir / "checkpoints" / "step-00000004" / weights).unlink()
    os.truncate(run_dir / "checkpoints" / "step-00000008" / weights, 10)
    (run_dir / "artifacts" / "hf" / "extra.bin").write_text("x")
    assert problems(run_dir) == [
        f"checkpoints/step-00000008/{weights}: 10 bytes, the manifest says 201",
        f"checkpoints/step-00000004/{weights}: missing",
        "artifacts/hf/extra.bin: not in the manifest",
    ]


def test_an_unreadable_manifest_is_a_problem_of_its_own(make_run: MakeRun) -> None:
    run_dir = make_run()
    (run_dir / "checkpoints" / "step-00000004" / "manifest.json").write_text("{")
    (run_dir / "artifacts" / "hf" / "artifact.json").write_text("[]")
    first, second = problems(run_dir)
    assert first.startswith("checkpoints/step-00000004/manifest.json: cannot be read (JSONDecodeError")
    assert second.startswith("artifacts/hf/artifact.json: not a valid manifest: ")


def test_a_checkpoint_without_a_manifest_and_a_best_one_that_is_gone_are_found(make_run: MakeRun) -> None:
    run_dir = make_run(artifact=False)
    newest = run_dir / "checkpoints" / "step-00000008"
    state = json.loads((newest / "state.json").read_text()) | {"best_step": 2}
    (newest / "state.json").write_text(json.dumps(state))
    reseal(newest, "manifest.json")
    (run_dir / "checkpoints" / "step-00000004" / "manifest.json").unlink()
    assert problems(run_dir) == [
        "checkpoints/step-00000004: has no manifest.json",
        "checkpoints/step-00000002: the best checkpoint is gone",
    ]


def test_checkpoints_that_vanished_altogether_are_missed(make_run: MakeRun) -> None:
    run_dir = make_run(artifact=False)
    shutil.rmtree(run_dir / "checkpoints")
    assert problems(run_dir) == ["checkpoints: is empty, though metrics.jsonl tells of checkpoints"]


def test_a_checkpoint_of_another_plan_is_found_though_its_hashes_agree(make_run: MakeRun) -> None:
    run_dir = make_run()
    plan = json.loads((run_dir / "plan.json").read_text())
    plan["recipe"]["optim"]["lr"] = 1.0
    (run_dir / "plan.json").write_text(json.dumps(plan))
    told = "was trained by another plan than the run's (optim.lr)"
    assert problems(run_dir) == [f"checkpoints/step-0000000{step}: {told}" for step in (8, 4)]


def test_an_artifact_of_another_checkpoint_than_the_one_it_names_is_found(make_run: MakeRun) -> None:
    run_dir = make_run()
    newest = run_dir / "checkpoints" / "step-00000008"
    (newest / "weights-00000-00000.safetensors").write_bytes(b"other weights")
    reseal(newest, "manifest.json")
    assert problems(run_dir) == ["artifacts/hf: was made of another step-00000008 than the one that is there"]
    shutil.rmtree(newest)  # retention may do that: then nothing can be said
    assert "made of another" not in "".join(problems(run_dir))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: [row for row in rows if '"step": 3' not in row], "missing: step 3"),
        (lambda rows: [*rows[:6], rows[3], *rows[6:]], "there more than once: step 2"),
        (lambda rows: [*rows[:2], rows[3], rows[2], *rows[4:]], "its steps are not in order"),
        (lambda rows: rows[:6], "ends at step 4, before checkpoint step-00000008 (step 8)"),
        (lambda rows: [*rows[:3], rows[3][:9], *rows[4:]], "line 4 is no record; missing: step 2"),
        (lambda rows: [*rows, rows[-1][:9]], ""),  # a kill cuts the last line short
    ],
)
def test_the_journal_has_every_step_once(
    make_run: MakeRun, change: Callable[[list[str]], list[str]], told: str
) -> None:
    run_dir = make_run()
    rewrite(run_dir / "metrics.jsonl", change)
    assert problems(run_dir) == [f"metrics.jsonl: {part}" for part in told.split("; ") if part]


def test_a_step_left_out_because_it_was_not_finite_is_not_missed(make_run: MakeRun) -> None:
    run_dir = make_run()
    rewrite(
        run_dir / "metrics.jsonl",
        lambda rows: [row.replace('"kind": "step", "step": 3', '"kind": "nonfinite", "step": 3') for row in rows],
    )
    assert problems(run_dir) == []


def test_many_missing_steps_are_one_short_line(make_run: MakeRun) -> None:
    run_dir = make_run(steps=40, saved=(40,))
    rewrite(run_dir / "metrics.jsonl", lambda rows: [row for place, row in enumerate(rows) if place % 3])
    (told,) = problems(run_dir)
    assert told.startswith("metrics.jsonl: missing: steps 2, 5, 8, 11, 14 and ")


def test_prepared_data_is_held_to_the_plan_and_may_be_gone(make_run: MakeRun) -> None:
    run_dir = make_run()
    plan = json.loads((run_dir / "plan.json").read_text())
    data = Path(plan["prepared"])
    (run_dir / "plan.json").write_text(json.dumps(plan | {"num_samples": 17}))
    assert problems(run_dir) == [f"{data}/train.arrow: holds 16 samples, the plan says 17"]
    (run_dir / "plan.json").write_text(json.dumps(plan))
    shutil.rmtree(data)
    assert problems(run_dir) == []
    assert notes(run_dir) == [f"{data}: prepared data is gone; training makes it again"]


def test_what_killed_saves_left_is_noted_but_not_while_the_run_is_at_work(make_run: MakeRun) -> None:
    run_dir = make_run()
    (run_dir / "checkpoints" / ".step-00000012.staging").mkdir()
    assert problems(run_dir) == []
    assert notes(run_dir) == [
        "checkpoints/.step-00000012.staging: left by a save or export that was cut short; harmless"
    ]
    with run.lock(run_dir, doing="training"):
        assert notes(run_dir) == []


def test_what_a_restart_set_aside_as_damaged_is_a_problem(make_run: MakeRun) -> None:
    run_dir = make_run()
    (run_dir / "checkpoints" / "damaged-step-00000006").mkdir()
    (told,) = problems(run_dir)
    assert told.startswith("checkpoints/damaged-step-00000006: was damaged and set aside")


def test_damaged_small_records_are_found(make_run: MakeRun) -> None:
    run_dir = make_run()
    for name in ("plan.json", "environment.json", "status.json"):
        (run_dir / name).write_text("{")
    assert [told.partition(":")[0] for told in problems(run_dir)] == ["plan.json", "environment.json", "status.json"]


def test_a_checkpoint_that_retention_removes_meanwhile_is_no_problem(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(artifact=False)
    flaws = verify.checkpoint.flaws

    def removing(directory: Path, **options: Any) -> list[str]:
        if directory.name == "step-00000004":
            doomed = directory.rename(directory.with_name(".step-00000004.doomed"))
            (doomed / "state.json").unlink()
        return flaws(directory, **options)

    monkeypatch.setattr(verify.checkpoint, "flaws", removing)
    assert problems(run_dir) == []


def test_an_artifact_that_is_replaced_meanwhile_is_looked_at_again(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run()
    artifact = run_dir / "artifacts" / "hf"
    shutil.copytree(artifact, run_dir / "new")
    (artifact / "model.safetensors").write_bytes(b"half old, half new")
    looks = []
    compare = verify.disagreements

    def replacing(directory: Path, *arguments: Any, **options: Any) -> list[str]:
        found = compare(directory, *arguments, **options)
        if directory == artifact:
            looks.append(found)
        if len(looks) == 1 and directory == artifact:
            shutil.rmtree(artifact)
            (run_dir / "new").rename(artifact)
        return found

    monkeypatch.setattr(verify, "disagreements", replacing)
    assert problems(run_dir) == []
    assert [len(found) for found in looks] == [1, 0]


def test_the_ledger_is_audited_where_the_run_keeps_one(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify.ledger, "audit", lambda run_dir: [f"epoch 1: sample 3 repeated in {run_dir.name}"])
    run_dir = make_run()
    assert problems(run_dir) == []
    plan = json.loads((run_dir / "plan.json").read_text())
    plan["recipe"]["train"]["ledger"] = True
    for path in (run_dir, run_dir / "checkpoints" / "step-00000004", run_dir / "checkpoints" / "step-00000008"):
        (path / "plan.json").write_text(json.dumps(plan))
    told = "ledger.jsonl: epoch 1: sample 3 repeated in one"
    assert told in problems(run_dir)


def test_progress_is_told_in_bytes_and_shared_data_is_hashed_once(make_run: MakeRun) -> None:
    runs = [make_run("one"), make_run("two")]
    seen: list[int] = []
    known: dict[Path, list[verify.Finding]] = {}
    for run_dir in runs:
        verify.verify(run_dir, advance=seen.append, known=known)
    assert sum(seen) == hashed_bytes(runs) > 0


def test_a_search_is_verified_with_its_trials(make_run: MakeRun) -> None:
    trial = make_run("hunt/trials/trial_0", artifact=False)
    search = trial.parent.parent
    (search / "trials.json").write_text("[")
    assert verifiable(search) == [search, trial]
    (told,) = problems(search)
    assert told.startswith("trials.json: cannot be read")
