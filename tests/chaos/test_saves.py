"""Saves that are broken into at every operation, checkpoints of which any byte is damaged, storage that fails.

RAYTX_CHAOS_LONG=1 breaks into every save of a run, in the background and not; without it, into one.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken_disk import dying
from rich.console import Console

from raytx import checkpoint, files, saving, worker
from raytx.checkpoint import Checkpoint
from raytx.errors import TrainingError
from raytx.plan import Plan, resolve
from raytx.prepare import prepare
from raytx.testing import tiny_recipe

pytestmark = pytest.mark.chaos
LONG = os.environ.get("RAYTX_CHAOS_LONG") == "1"
STEPS = 6
Log = list[dict[str, Any]]
Modes = tuple[bool, ...]
"""Whether the power fails as well, in turn."""


@dataclass(frozen=True)
class Run:
    """A tiny run whose saves can be told apart by their steps: 2, 4 and 6."""

    plan: Plan
    """With three checkpoints in its directory, and its weights after six steps."""
    weights: dict[str, np.ndarray]

    def elsewhere(self, storage: Path, *, keep: tuple[int, ...] = (), **save: Any) -> Plan:
        """Return the same run in another storage, in which some of its checkpoints are there already."""
        overrides = {"storage_path": str(storage), **{f"save.{key}": value for key, value in save.items()}}
        plan = replace(self.plan, recipe=self.plan.recipe.override(overrides))
        for step in keep:
            source = checkpoint.directory_of(self.plan.run_dir, step)
            shutil.copytree(source, checkpoint.directory_of(plan.run_dir, step))
        return plan


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    sizes = {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "max_length": 32}
    recipe = tiny_recipe(
        storage_path=str(tmp_path_factory.mktemp("run")), train=sizes, save={"every": 2, "num_to_keep": None}
    )
    plan = prepare(resolve(recipe), Console(quiet=True))[0]
    trained(plan)
    return Run(plan, weights(plan))


def trained(plan: Plan, *, order_at: int | None = None) -> Log:
    """Train; where `order_at` is given, an order to save comes when that step is done."""
    log: Log = []

    def order() -> worker.Order:
        done = any(row["kind"] == "step" and row["step"] == order_at for row in log)
        return worker.Order(1, "save") if done else worker.Order()

    worker.train(plan, worker.Session(0, log.append, flush=lambda: None, report=lambda metrics: None, order=order))
    return log


def weights(plan: Plan) -> dict[str, np.ndarray]:
    """Return the newest checkpoint's weights and moments."""
    found = checkpoint.newest(plan.run_dir)
    assert found is not None
    found._open()
    return {key: file.get_tensor(key) for key, file in found._places.items()}


def same(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> bool:
    return some.keys() == others.keys() and all(np.array_equal(some[key], others[key]) for key in some)


def names(plan: Plan) -> list[str]:
    return sorted(path.name for path in (plan.run_dir / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------ killed at every operation


def broken_into(
    run: Run, storage: Path, at: int | None, bug: Callable[[], Any], power_fails: bool, twice: bool, **save: Any
) -> tuple[bool, int, str]:
    """Go on from step 2 of a run that keeps one checkpoint, and die at an operation of its saves.

    With `twice` an order breaks into the evaluation of step 4, which is saved without its metrics and again with them.
    Returns whether it died, how many operations there were, and what is wrong with what it left; "" where nothing is.
    """
    plan = run.elsewhere(storage, keep=(2,), num_to_keep=1, **save)
    limit = ({} if LONG else {"train.steps": 4}) | ({"evaluate.every": 4} if twice else {})

    def go() -> None:
        bug()
        limited = replace(plan, recipe=plan.recipe.override(limit), steps=limit.get("train.steps", STEPS))
        trained(limited, order_at=4 if twice else None)

    died, done = dying(storage, at=at, do=go, power_fails=power_fails)
    return died, done, wrong_with(plan) or not_going_on(run, plan)


def wrong_with(plan: Plan) -> str:
    """Return what a kill must never leave: no checkpoint at all, or something that claims to be one and is none."""
    found = [plan.run_dir / "checkpoints" / name for name in names(plan) if name.startswith("step-")]
    broken = [f"{path.name}: {problem}" for path in found if (problem := checkpoint.damage(path))]
    return "; ".join(broken) or ("" if found else "no checkpoint is left")


def not_going_on(run: Run, plan: Plan) -> str:
    """Resume without faults; return what then differs from the unbroken run."""
    trained(plan)
    if not same(weights(plan), run.weights):
        return "the weights differ from the unbroken run's"
    return "" if names(plan) == [f"step-{STEPS:08d}"] else f"left behind: {names(plan)}"


def sweep(
    run: Run,
    storage: Path,
    bug: Callable[[], Any] = lambda: None,
    *,
    modes: Modes,
    last_first: bool = False,
    twice: bool = False,
    **save: Any,
) -> str:
    """Die at every operation, in one mode after the other; return the first thing that is wrong, or ""."""
    died, done, wrong = broken_into(run, storage / "untouched", None, bug, False, twice, **save)
    assert not died
    assert done > 30, "a save has more operations than this: they are not seen"
    moments = range(1, done + 1)
    for at in reversed(moments) if last_first else moments:
        power_fails = modes[at % len(modes)]
        _, _, wrong = broken_into(run, storage / str(at), at, bug, power_fails, twice, **save)
        shutil.rmtree(storage / str(at))
        if wrong:
            return f"died at operation {at} of {done}{' and power failed' * power_fails}: {wrong}"
    return ""


@pytest.mark.parametrize("background", [True, False] if LONG else [True])
@pytest.mark.parametrize("modes", [(True,), (False,)] if LONG else [(True, False)], ids=str)
def test_a_run_that_dies_at_any_operation_of_a_save_goes_on_to_the_same_bits(
    run: Run, tmp_path: Path, modes: Modes, background: bool
) -> None:
    assert sweep(run, tmp_path, modes=modes, background=background) == ""


def test_a_run_that_dies_while_it_replaces_a_checkpoint_of_the_same_step_goes_on_to_the_same_bits(
    run: Run, tmp_path: Path
) -> None:
    assert sweep(run, tmp_path, modes=(True, False), twice=True) == ""


def skip_the_fsync_of_files() -> None:
    fsync = os.fsync
    os.fsync = lambda handle: fsync(handle) if os.path.isdir(f"/proc/self/fd/{handle}") else None  # type: ignore


def skip_the_fsync_of_directories() -> None:
    checkpoint.sync_directory = lambda path: None  # type: ignore[attr-defined]


def rename_before_the_manifest() -> None:
    def seal(staging: Path, target: Path, *, files: Any, content: Any) -> None:
        staging.rename(target)
        checkpoint.finish(target, files=files, content=content)

    checkpoint.seal = seal  # type: ignore[assignment]


def retain_before_the_commit() -> None:
    seal = checkpoint.seal

    def early(staging: Path, target: Path, **options: Any) -> None:
        shutil.rmtree(target.with_name("step-00000002"), ignore_errors=True)
        seal(staging, target, **options)

    checkpoint.seal = early


def remove_in_place() -> None:
    checkpoint._remove = lambda directory: shutil.rmtree(directory)  # type: ignore[assignment]


NO_MANIFEST = r"step-0000000[24]: manifest\.json: missing"
FOUND_AS = {
    rename_before_the_manifest: NO_MANIFEST,
    retain_before_the_commit: "no checkpoint is left",
    remove_in_place: NO_MANIFEST,
    skip_the_fsync_of_files: r"step-00000004: .*(cannot be read|SHA-256 differs|bytes, the manifest says)",
    skip_the_fsync_of_directories: NO_MANIFEST,
}
NEED_A_POWER_FAILURE = {skip_the_fsync_of_files, skip_the_fsync_of_directories}


@pytest.mark.parametrize("bug", FOUND_AS, ids=lambda bug: bug.__name__)
def test_dying_at_every_operation_finds_a_planted_bug(run: Run, tmp_path: Path, bug: Callable[[], None]) -> None:
    wrong = sweep(run, tmp_path, bug, modes=(bug in NEED_A_POWER_FAILURE,), last_first=True)
    assert re.search(rf"died at operation \d+ of \d+( and power failed)?: {FOUND_AS[bug]}", wrong)


# ----------------------------------------------------------------------------------------------- damaged bytes


def flipped(path: Path, chance: random.Random) -> bytes:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def truncated(path: Path, chance: random.Random) -> bytes:
    data = path.read_bytes()
    return data[: chance.randrange(len(data))]


REASONS = ("SHA-256 differs", "bytes, the manifest says", "cannot be read", "format")
Damage = Callable[[Path, random.Random], bytes]


def undetected(run: Run, damage: Damage, count: int) -> list[str]:
    """Damage the newest one, two or three checkpoints, a file in each, `count` times in all; return what went wrong.

    Every file of every checkpoint has its turn.
    """
    chance = random.Random(0)
    directories = checkpoint.complete(run.plan.run_dir)
    turns = {directory: [path for path in files.walk(directory) if path.stat().st_size] for directory in directories}
    found, done = [], 0
    while done < count:
        hit = directories[: 1 + chance.randrange(len(directories))]
        spoilt = [turns[directory][done % len(turns[directory])] for directory in hit]
        before = {path: path.read_bytes() for path in spoilt}
        for path in spoilt:
            path.write_bytes(damage(path, chance))
        found += judged(run.plan, spoilt, [*directories, None][len(hit)])
        for path, data in before.items():
            path.write_bytes(data)
        done += len(hit)
    return found


def judged(plan: Plan, spoilt: list[Path], next_one: Path | None) -> list[str]:
    """Return where the newest checkpoint is not the next good one, or a damaged file is not named with a reason."""
    told: list[str] = []
    newest = checkpoint.newest(plan.run_dir, tell=told.append)
    wrong = [] if (newest and newest.directory) == next_one else [f"{spoilt}: {newest and newest.directory} was used"]
    for path, text in zip(spoilt, [*told, *[""] * len(spoilt)], strict=False):
        name = str(path.relative_to(next(parent for parent in path.parents if parent.name.startswith("step-"))))
        if name not in text or not any(reason in text for reason in REASONS):
            wrong.append(f"{path}: {text!r} was told")
    return wrong


@pytest.mark.parametrize(("damage", "count"), [(flipped, 1000), (truncated, 500)], ids=["flipped", "truncated"])
def test_every_damaged_byte_is_noticed_and_the_newest_good_checkpoint_used(run: Run, damage: Damage, count: int):
    assert undetected(run, damage, count) == []


def skip_a_hash(patch: pytest.MonkeyPatch) -> None:
    real = files._disagreement
    patch.setattr(files, "_disagreement", lambda path, wanted: None if "optimizer" in path.name else real(path, wanted))


def skip_the_manifests_own_hash(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint, "read_sealed", files.read_json)


@pytest.mark.parametrize("bug", [skip_a_hash, skip_the_manifests_own_hash], ids=lambda bug: bug.__name__)
def test_damaging_bytes_finds_a_planted_bug(run: Run, monkeypatch: pytest.MonkeyPatch, bug: Callable[..., None]):
    bug(monkeypatch)
    assert undetected(run, flipped, 200)


# ------------------------------------------------------------------------------------------- storage that fails


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "PAUSES_S", (0.05, 0.1, 0.2))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of one mebibyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    told = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if told.returncode:
        pytest.skip(f"mounting a small file system is not allowed here: {told.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def stopped(plan: Plan) -> str:
    with pytest.raises(TrainingError) as error:
        trained(plan)
    assert "goes on from the last complete checkpoint" in str(error.value)
    return str(error.value)


def whole(plan: Plan) -> list[str]:
    """Return the names of the checkpoints, after a look at every hash and at what is left beside them."""
    left = checkpoint.complete(plan.run_dir)
    assert [checkpoint.damage(path) for path in left] == [None] * len(left)
    assert not list((plan.run_dir / "checkpoints").glob(".step-*"))
    return [path.name for path in left]


def free(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_stops_the_run_with_one_error_and_the_run_goes_on_when_there_is_room(
    run: Run, small_disk: Path, background: bool
):
    plan = run.elsewhere(small_disk, keep=(2,), background=background)
    ballast = small_disk / "ballast"
    size = sum(path.stat().st_size for path in files.walk(checkpoint.directory_of(plan.run_dir, 2)))
    ballast.write_bytes(b"x" * (free(small_disk) - size // 2))
    assert "No space left" in stopped(plan)
    assert whole(plan) == ["step-00000002"]
    ballast.unlink()
    log = trained(replace(plan, recipe=plan.recipe.override({"save.num_to_keep": 1})))
    assert [row["step"] for row in log if row["kind"] == "resumed"] == [2]
    assert same(weights(plan), run.weights)


@pytest.mark.usefixtures("short_pauses")
def test_storage_that_became_read_only_stops_the_run_with_one_error(run: Run, small_disk: Path):
    plan = run.elsewhere(small_disk, keep=(2,))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "Read-only file system" in stopped(plan)
    assert whole(plan) == ["step-00000002"]
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    trained(replace(plan, recipe=plan.recipe.override({"save.num_to_keep": 1})))
    assert same(weights(plan), run.weights)


def test_storage_that_vanishes_and_returns_costs_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The directory above the run is gone from the first write on, until the last pause before the run would stop."""
    plan, hidden, put = run.elsewhere(tmp_path / "storage", keep=(2,)), tmp_path / "hidden", saving.write_safetensors
    paused: list[float] = []

    def vanishing(*args: Any, **options: Any) -> Any:
        if not paused and not hidden.exists():
            plan.run_dir.parent.rename(hidden)
        return put(*args, **options)

    def pausing(save: Any, pause: float) -> bool:
        paused.append(pause)
        if pause == saving.PAUSES_S[-1]:
            hidden.rename(plan.run_dir.parent)
        return False

    monkeypatch.setattr(saving, "write_safetensors", vanishing)
    monkeypatch.setattr(saving._Save, "pause", pausing)
    remarks = [row["text"] for row in trained(plan) if row["kind"] == "remark" and "tried again" in row["text"]]
    assert paused == [*saving.PAUSES_S]
    assert len(remarks) == len(paused)
    assert all("No such file or directory" in text for text in remarks)
    assert same(weights(plan), run.weights)


def test_training_goes_on_while_slow_storage_is_written_to(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    put = saving.write_safetensors
    monkeypatch.setattr(saving, "write_safetensors", lambda *args, **options: time.sleep(0.5) or put(*args, **options))
    monkeypatch.setattr(saving, "NOTICEABLE_S", 0.2)
    plan = run.elsewhere(tmp_path)
    log = trained(plan)
    at = {(row["kind"], row["step"]): place for place, row in enumerate(log) if "step" in row}
    assert at["step", 4] < at["checkpoint", 2], "steps 3 and 4 were done while step 2 was being saved"
    saved = [row for row in log if row["kind"] == "checkpoint"]
    assert [row["step"] for row in saved] == [2, 4, 6]
    assert all(row["seconds"] > 1.0 for row in saved), "two files of half a second each"
    assert saved[0]["stall_s"] < 0.5
    (remark,) = [row["text"] for row in log if row["kind"] == "remark"]
    assert "raise save.every" in remark
    assert same(weights(plan), run.weights)


def test_training_waits_where_nothing_is_written_in_the_background(run: Run, tmp_path: Path):
    log = trained(run.elsewhere(tmp_path, background=False))
    assert [row["step"] for row in log if row["kind"] in {"step", "checkpoint"}] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert all(row["stall_s"] == row["seconds"] for row in log if row["kind"] == "checkpoint")
    assert Checkpoint(checkpoint.directory_of(run.elsewhere(tmp_path).run_dir, 6)).step == 6
