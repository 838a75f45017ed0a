"""Saves under way: agreed on by all ranks, of one moment, whole or given up."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytx import checkpoint, saving
from raytx.artifact import Golden
from raytx.checkpoint import Checkpoint, State
from raytx.components import TensorHeader
from raytx.errors import TrainingError
from raytx.plan import Plan, resolve
from raytx.saving import Saver
from raytx.testing import tiny_recipe

GOLDEN = Golden({"input_ids": np.zeros((1, 2), dtype=np.int64)}, np.zeros((1, 2), dtype=np.float32))
Tensors = dict[str, np.ndarray]


class Meeting:
    """Where ranks that are threads tell each other values."""

    def __init__(self, ranks: int) -> None:
        self._barrier, self._values = threading.Barrier(ranks, timeout=20), [None] * ranks

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


class FakeEngine:
    """Holds some tensors, of which it writes its share."""

    def __init__(self, tensors: Tensors, rank: int, meeting: Meeting) -> None:
        self.held, self._rank, self._meeting = tensors, rank, meeting

    def gather(self, value: Any) -> list[Any]:
        return self._meeting.gather(self._rank, value)

    def tensors(self) -> Iterator[tuple[str, str, np.ndarray]]:
        for key, array in self.held.items():
            name, _, part = key.partition("|")
            yield name, part or "weight", array


def share(rank: int) -> Tensors:
    """Return a rank's tensors: a weight and two moments of it."""
    names = [f"layer{rank}", f"layer{rank}|exp_avg", f"layer{rank}|exp_avg_sq"]
    return {name: np.full((3, 4), 10 * rank + place, dtype=np.float32) for place, name in enumerate(names)}


def headers(shares: list[Tensors]) -> dict[str, TensorHeader]:
    return {key: TensorHeader("F32", array.shape) for tensors in shares for key, array in tensors.items()}


@pytest.fixture(scope="module")
def plain() -> Plan:
    return resolve(tiny_recipe())


@pytest.fixture
def plan(plain: Plan, tmp_path: Path) -> Plan:
    """A plan of a run in a directory of its own, with a processor of one file."""
    (tmp_path / "prepared" / "processor").mkdir(parents=True)
    (tmp_path / "prepared" / "processor" / "tokens.json").write_text("{}")
    recipe = plain.recipe.override({"storage_path": str(tmp_path / "runs"), "save.num_to_keep": 2})
    return replace(plain, recipe=recipe, prepared=str(tmp_path / "prepared"))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "PAUSES_S", (0.01, 0.02))


def on_ranks(plan: Plan, shares: list[Tensors], do: Callable[[Saver, int], Any], **options: Any) -> list[Any]:
    """Do something with a saver on each of several ranks; return what came of it, an exception where it raised."""
    meeting, log = Meeting(len(shares)), options.pop("log", [])
    flush = options.pop("flush", lambda: None)
    promised = options.pop("promised", None) or headers(shares)

    def one(rank: int) -> Any:
        engine: Any = FakeEngine(shares[rank], rank, meeting)
        try:
            saver = Saver(engine, plan, rank=rank, promised=promised, log=log.append, flush=flush)
            return do(saver, rank)
        except TrainingError as error:
            return error

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(one, range(len(shares))))


def save(saver: Saver, step: int = 1) -> None:
    saver.begin(State(step=step), golden=GOLDEN, demo=[])


def save_and_wait(saver: Saver, rank: int) -> None:
    save(saver)
    saver.wait()


def stored(plan: Plan, step: int = 1) -> Tensors:
    found = Checkpoint(checkpoint.directory_of(plan.run_dir, step))
    assert checkpoint.damage(found.directory) is None
    found._open()
    return {key: file.get_tensor(key) for key, file in found._places.items()}


def left(plan: Plan) -> list[str]:
    return sorted(path.name for path in (plan.run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("background", [True, False])
def test_what_ranks_hold_becomes_one_checkpoint(plan: Plan, background: bool) -> None:
    plan = replace(plan, recipe=plan.recipe.override({"save.background": background}))
    shares = [share(rank) for rank in range(3)]
    assert on_ranks(plan, shares, save_and_wait) == [None] * 3
    found = stored(plan)
    for key, array in (item for tensors in shares for item in tensors.items()):
        np.testing.assert_array_equal(found.pop(key), array)
    assert not found
    assert left(plan) == ["step-00000001"]
    entry = checkpoint.Checkpoint(checkpoint.directory_of(plan.run_dir, 1)).manifest["files"]
    assert entry["weights-00002-00000.safetensors"]["tensors"] == {"layer2": "F32[3,4]"}


def test_a_rank_starts_a_new_file_when_one_is_full(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "SHARD_BYTES", 50)  # two of 48 bytes
    tensors = {f"layer{place}": np.full((3, 4), place, dtype=np.float32) for place in range(5)}
    on_ranks(plan, [tensors], save_and_wait)
    assert len(list(checkpoint.directory_of(plan.run_dir, 1).glob("weights-00000-*"))) == 3
    assert stored(plan).keys() == tensors.keys()


def save_change_and_wait(saver: Saver, rank: int) -> None:
    save(saver)
    for array in saver._engine.held.values():  # type: ignore[attr-defined]
        array += 100
    saver.wait()


def slowly(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    write = saving.write_safetensors
    monkeypatch.setattr(saving, "write_safetensors", lambda *a, **o: time.sleep(seconds) or write(*a, **o))


def test_what_is_written_is_of_the_moment_of_the_save(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch, 0.1)
    on_ranks(plan, [share(0)], save_change_and_wait)
    np.testing.assert_array_equal(stored(plan)["layer0"], share(0)["layer0"])


def test_without_the_copy_it_would_not_be(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch, 0.1)
    monkeypatch.setattr(saving, "_copied", lambda engine: iter(engine.held.items()))
    on_ranks(plan, [share(0)], save_change_and_wait)
    assert not np.array_equal(stored(plan)["layer0"], share(0)["layer0"])


def test_training_is_not_held_up_by_writing(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    going_on = threading.Event()
    write = saving.write_safetensors
    monkeypatch.setattr(saving, "write_safetensors", lambda *a, **o: going_on.wait(20) and write(*a, **o))

    def do(saver: Saver, rank: int) -> list[str]:
        save(saver)
        phases = [saver.status().phase]
        saver.council([saver.status()])
        going_on.set()
        saver.wait()
        return [*phases, saver.status().phase]

    assert on_ranks(plan, [share(0)], do) == [["writing", "idle"]]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda one: one.pop("layer1|exp_avg"), "layer1|exp_avg is missing"),
        (lambda one: one.update(layer1=np.zeros((4, 3), np.float32)), "layer1 is F32[4,3], the model has F32[3,4]"),
        (lambda one: one.update(layer1=np.zeros((3, 4), np.float16)), "layer1 is F16[3,4], the model has F32[3,4]"),
        (lambda one: one.update(layer1=np.zeros((0, 4), np.float32)), "layer1 is empty: F32[0,4]"),
        (lambda one: one.update(layer0=np.zeros((3, 4), np.float32)), "layer0 was written 2 times"),
    ],
)
def test_a_tensor_that_is_not_what_the_model_has_is_refused_on_every_rank(
    plan: Plan, spoil: Callable[[Tensors], Any], told: str
) -> None:
    shares = [share(0), share(1)]
    on_ranks(plan, shares, save_and_wait)
    promised = headers(shares)
    spoil(shares[1])
    errors = on_ranks(plan, shares, lambda saver, rank: (save(saver, 2), saver.wait()), promised=promised)
    assert [told in str(error) for error in errors] == [True, True]
    assert len({str(error) for error in errors}) == 1
    assert left(plan) == ["step-00000001"]
    stored(plan)


def test_without_that_check_a_checkpoint_with_a_hole_would_be_committed(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "broken_promises", lambda files, promised: [])
    shares = [share(0)]
    promised = headers(shares)
    del shares[0]["layer0"]
    on_ranks(plan, shares, save_and_wait, promised=promised)
    assert "layer0" not in stored(plan)


def failing(monkeypatch: pytest.MonkeyPatch, *, rank: int, times: int) -> None:
    """Let a rank's first writes fail as on a full disk."""
    write, failed = saving.write_safetensors, []

    def maybe(path: Path, *args: Any, **options: Any) -> Any:
        if f"-{rank:05d}-" in path.name and len(failed) < times:
            failed.append(path)
            raise OSError(28, "No space left on device", str(path))
        return write(path, *args, **options)

    monkeypatch.setattr(saving, "write_safetensors", maybe)


def test_a_rank_that_cannot_write_stops_all_with_one_error(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [share(0), share(1)]
    on_ranks(plan, shares, save_and_wait)
    failing(monkeypatch, rank=1, times=99)
    errors = on_ranks(plan, shares, lambda saver, rank: (save(saver, 2), saver.wait()))
    assert len({str(error) for error in errors}) == 1
    assert "rank 1: No space left on device" in str(errors[0])
    assert "goes on from the last complete checkpoint" in str(errors[0])
    assert left(plan) == ["step-00000001"]


@pytest.mark.parametrize("background", [True, False])
def test_a_write_that_fails_is_tried_again_and_told_of(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    plan = replace(plan, recipe=plan.recipe.override({"save.background": background}))
    failing(monkeypatch, rank=1, times=2)
    log: list[dict[str, Any]] = []
    assert on_ranks(plan, [share(0), share(1)], save_and_wait, log=log) == [None, None]
    remarks = [row["text"] for row in log if row["kind"] == "remark"]
    assert len(remarks) == 2
    assert all("rank 1: No space left on device" in text for text in remarks)
    assert stored(plan)


def test_a_save_that_falls_due_waits_for_the_one_before_and_says_so_once(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(monkeypatch, 0.2)
    monkeypatch.setattr(saving, "NOTICEABLE_S", 0.05)
    log: list[dict[str, Any]] = []

    def do(saver: Saver, rank: int) -> None:
        for step in (1, 2, 3):
            save(saver, step)
        saver.wait()

    on_ranks(plan, [share(0)], do, log=log)
    assert [row["step"] for row in log if row["kind"] == "checkpoint"] == [1, 2, 3]
    (remark,) = [row["text"] for row in log if row["kind"] == "remark"]
    assert "step 2: training waited" in remark
    assert "raise save.every" in remark


def test_a_checkpoint_that_is_there_already_is_replaced_and_whole_under_either_name_meanwhile(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_ranks(plan, [share(0)], save_and_wait)
    before = checkpoint.directory_of(plan.run_dir, 1).stat().st_ino
    seen: list[list[str]] = []
    rename = Path.rename

    def watched(path: Path, target: Path) -> Path:
        renamed = rename(path, target)
        seen.append([found.name for found in checkpoint.complete(plan.run_dir) if checkpoint.damage(found) is None])
        return renamed

    monkeypatch.setattr(Path, "rename", watched)
    on_ranks(plan, [share(0)], save_and_wait)
    assert seen == [["step-00000001.replaced"], ["step-00000001", "step-00000001.replaced"], ["step-00000001"]]
    assert checkpoint.directory_of(plan.run_dir, 1).stat().st_ino != before
    assert left(plan) == ["step-00000001"]


def test_one_that_was_killed_while_it_was_replaced_can_be_replaced_again(plan: Plan) -> None:
    on_ranks(plan, [share(0)], save_and_wait)
    whole = checkpoint.directory_of(plan.run_dir, 1)
    shutil.copytree(whole, whole.with_name(whole.name + checkpoint.REPLACED))  # killed before it removed this
    assert on_ranks(plan, [share(0)], save_and_wait) == [None]
    assert left(plan) == ["step-00000001"]


def test_a_damaged_one_of_the_same_step_is_replaced(plan: Plan) -> None:
    on_ranks(plan, [share(0)], save_and_wait)
    (checkpoint.directory_of(plan.run_dir, 1) / "state.json").write_text("{}")
    on_ranks(plan, [share(0)], save_and_wait)
    assert stored(plan)
    assert left(plan) == ["damaged-step-00000001", "step-00000001"]


def test_files_that_vanish_before_the_commit_are_noticed(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    seal = checkpoint.seal

    def losing(staging: Path, target: Path, **options: Any) -> None:
        next(staging.glob("optimizer-*")).unlink()
        seal(staging, target, **options)

    monkeypatch.setattr(checkpoint, "seal", losing)
    (error,) = on_ranks(plan, [share(0)], save_and_wait)
    assert "optimizer-00000-00000.safetensors: written, and now gone" in str(error)
    assert left(plan) == []


def test_a_journal_that_is_not_on_disk_is_waited_for_and_told(plan: Plan) -> None:
    log, refusals = [], [OSError(28, "No space left on device", "ledger.jsonl")]

    def flush() -> None:
        if refusals:
            raise refusals.pop()

    assert on_ranks(plan, [share(0)], save_and_wait, log=log, flush=flush) == [None]
    assert left(plan) == ["step-00000001"]
    (remark,) = [record["text"] for record in log if record["kind"] == "remark"]
    assert remark.endswith("failed and was tried again (rank 0: No space left on device (ledger.jsonl))")


def test_a_checkpoint_is_not_made_without_its_journal(plan: Plan) -> None:
    def flush() -> None:
        raise OSError(28, "No space left on device", "ledger.jsonl")

    (error,) = on_ranks(plan, [share(0)], save_and_wait, flush=flush)
    assert "rank 0: No space left on device (ledger.jsonl). Mend that and run the same command again" in str(error)
    assert left(plan) == []
