"""Checkpoints on disk: which one is taken, by whom, and which ones stay."""

from __future__ import annotations

import errno
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from raytx import checkpoint, files
from raytx.checkpoint import FORMAT, MANIFEST, REPLACED, promised, retain
from raytx.components import TensorHeader
from raytx.errors import CheckpointError
from raytx.files import inventory, write_json, write_sealed
from raytx.sections import Optim

DAMAGE = checkpoint.damage


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Checkpoints of steps 1 to 4, of six small files each."""
    for step in range(1, 5):
        directory = checkpoint.directory_of(tmp_path, step)
        directory.mkdir(parents=True)
        write_json(directory / "state.json", {"step": step})
        for place in range(5):
            (directory / f"weights-{place}").write_text(f"{step} {place}")
        write_sealed(directory / MANIFEST, {"format": FORMAT, "step": step, "files": inventory(directory)})
    return tmp_path


def spoil(run_dir: Path, step: int, name: str = "weights-3") -> None:
    (checkpoint.directory_of(run_dir, step) / name).write_text("? ?")


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_every_rank_gets_the_same_checkpoint_and_hashes_a_share_of_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(run_dir, 4)
    hashed: list[Path] = []
    told: list[str] = []
    sha256 = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path) or sha256(path))
    barrier, values = threading.Barrier(3, timeout=20), [None] * 3

    def on(rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            found = list(values)
            barrier.wait()
            return found

        tell = told.append if rank == 0 else None
        return checkpoint.newest(run_dir, tell=tell, set_aside=True, rank=rank, gather=gather)

    with ThreadPoolExecutor(3) as pool:
        found = [one.directory.name for one in pool.map(on, range(3))]
    assert found == ["step-00000003"] * 3
    whole = [path for path in hashed if path.parent.name == "step-00000003"]
    assert len(whole) == len(set(whole)) == 6, "each file by one rank"
    assert len(hashed) == 18, "and each of the damaged one by one rank, and once more by rank 0, which judges it"
    assert told == [
        "checkpoint step-00000004 is damaged and passed over: weights-3: its SHA-256 differs from the manifest"
    ]
    assert names(run_dir)[0] == "damaged-step-00000004"


def on_two_ranks(run_dir: Path, blind: Path | None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Look for the newest on two ranks, of which the second does not see a directory; return what they got."""
    barrier, values = threading.Barrier(2, timeout=20), [None] * 2

    def damage(directory: Path, *, share: tuple[int, int] = (0, 1)) -> str | None:
        if share[0] == 1 and blind is not None and directory.is_relative_to(blind):
            return f"{MANIFEST}: missing"
        return DAMAGE(directory, share=share)

    def on(rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            seen = list(values)
            barrier.wait()
            return seen

        try:
            return checkpoint.newest(run_dir, set_aside=True, rank=rank, gather=gather)
        except CheckpointError as error:
            return str(error)

    monkeypatch.setattr(checkpoint, "damage", damage)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(on, range(2)))


def test_a_rank_that_does_not_see_the_storage_stops_all_and_nothing_is_set_aside(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names(run_dir)
    told = on_two_ranks(run_dir, run_dir, monkeypatch)
    assert all("whole as rank 0 sees it, but not as rank 1 does" in text for text in told)
    assert "Is the storage mounted on every node?" in told[0]
    assert names(run_dir) == before
    assert [one.step for one in on_two_ranks(run_dir, None, monkeypatch)] == [4, 4]


def test_what_cannot_be_read_for_a_while_is_passed_over_but_stays(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    with monkeypatch.context() as patch:

        def sha256(path: Path) -> str:
            if path.parent.name == "step-00000004":
                raise OSError(errno.EIO, "Input/output error", str(path))
            return real(path)

        real = files.sha256
        patch.setattr(files, "sha256", sha256)
        found = checkpoint.newest(run_dir, tell=told.append, set_aside=True)
    assert found is not None
    assert found.step == 3
    assert "Input/output error" in told[0]
    again = checkpoint.newest(run_dir, set_aside=True)
    assert again is not None
    assert again.step == 4


def test_a_checkpoint_that_is_being_replaced_counts_until_the_other_is_there(run_dir: Path) -> None:
    newest = checkpoint.directory_of(run_dir, 4)
    newest.rename(newest.with_name(newest.name + REPLACED))
    found = checkpoint.newest(run_dir)
    assert found is not None
    assert (found.step, found.directory.name) == (4, newest.name + REPLACED)
    retain(run_dir, step=4, attempt="6f", num_to_keep=1, best_step=None)
    assert names(run_dir) == [newest.name + REPLACED]


def test_a_checkpoint_that_was_replaced_comes_after_what_replaces_it_and_goes_next(run_dir: Path) -> None:
    newest = checkpoint.directory_of(run_dir, 4)
    shutil.copytree(newest, newest.with_name(newest.name + REPLACED))
    assert [path.name for path in checkpoint.complete(run_dir)[:2]] == [newest.name, newest.name + REPLACED]
    retain(run_dir, step=4, attempt="6f", num_to_keep=2, best_step=None)
    assert names(run_dir) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("missing", [MANIFEST, "state.json", "weights-2"])
def test_a_checkpoint_without_one_of_its_files_is_passed_over_and_the_file_named(run_dir: Path, missing: str) -> None:
    (checkpoint.directory_of(run_dir, 4) / missing).unlink()
    told: list[str] = []
    found = checkpoint.newest(run_dir, tell=told.append)
    assert found is not None
    assert found.step == 3
    assert f"{missing}: missing" in told[0]


def test_a_checkpoint_that_another_version_wrote_is_neither_damage_nor_passed_over(run_dir: Path) -> None:
    directory = checkpoint.directory_of(run_dir, 4)
    write_sealed(directory / MANIFEST, {"format": 9, "step": 4, "files": {}})
    before = names(run_dir)
    with pytest.raises(CheckpointError, match=f"format 9, this raytx reads {FORMAT}. Another version of raytx wrote"):
        checkpoint.newest(run_dir, set_aside=True)
    assert names(run_dir) == before


def test_a_bit_that_flips_in_the_format_is_damage(run_dir: Path) -> None:
    manifest = checkpoint.directory_of(run_dir, 4) / MANIFEST
    manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT}', '"format": 2'))
    found = checkpoint.newest(run_dir, set_aside=True)
    assert found is not None
    assert found.step == 3
    assert "damaged-step-00000004" in names(run_dir)


def test_newest_ones_and_the_best_one_stay(run_dir: Path) -> None:
    retain(run_dir, step=4, attempt="6f", num_to_keep=1, best_step=2)
    assert names(run_dir) == ["step-00000002", "step-00000004"]


def test_what_is_ahead_of_the_one_just_committed_counts_for_nothing_and_stays(run_dir: Path) -> None:
    """It could not be read when the run went on from an earlier one, and may be whole."""
    retain(run_dir, step=3, attempt="6f", num_to_keep=1, best_step=None)
    assert names(run_dir) == ["step-00000003", "step-00000004"]


def test_the_best_one_stays_also_where_it_was_being_replaced(run_dir: Path) -> None:
    best = checkpoint.directory_of(run_dir, 2)
    best.rename(best.with_name(best.name + REPLACED))
    retain(run_dir, step=4, attempt="6f", num_to_keep=1, best_step=2)
    assert names(run_dir) == [f"step-00000002{REPLACED}", "step-00000004"]


def test_all_stay_where_no_number_is_given(run_dir: Path) -> None:
    retain(run_dir, step=4, attempt="6f", num_to_keep=None, best_step=None)
    assert len(names(run_dir)) == 4


def test_what_killed_attempts_left_is_removed(run_dir: Path) -> None:
    for name in (".step-00000003.5f.staging", ".step-00000001.doomed"):
        (run_dir / "checkpoints" / name).mkdir()
    retain(run_dir, step=4, attempt="6f", num_to_keep=4, best_step=None)
    assert len(names(run_dir)) == 4


def test_what_a_later_attempt_writes_is_spared_by_one_that_was_given_up(run_dir: Path) -> None:
    for attempt in ("6e", "6f", "70"):
        (run_dir / "checkpoints" / f".step-00000005.{attempt}.staging").mkdir()
    retain(run_dir, step=4, attempt="6f", num_to_keep=4, best_step=None)
    assert [name for name in names(run_dir) if name.startswith(".")] == [".step-00000005.70.staging"]
    checkpoint.make_room(run_dir)
    assert len(names(run_dir)) == 4, "a new attempt is the last one"


def test_a_structure_promises_what_is_trained_saved_and_kept_by_the_optimizer() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False)).to("meta")
    module[1].requires_grad_(False)
    found = promised(module, Optim(type="adafactor"))
    assert found == {
        "0.weight": TensorHeader("F32", (3, 4)),
        "0.bias": TensorHeader("F32", (3,)),
        "2.weight": TensorHeader("F32", (3, 3)),
        "1.running_mean": TensorHeader("", (3,)),
        "1.running_var": TensorHeader("", (3,)),
        "1.num_batches_tracked": TensorHeader("", ()),
        "0.weight|row_var": TensorHeader("F32", (3, 1)),
        "0.weight|col_var": TensorHeader("F32", (1, 4)),
        "0.bias|variance": TensorHeader("F32", (3,)),
        "2.weight|row_var": TensorHeader("F32", (3, 1)),
        "2.weight|col_var": TensorHeader("F32", (1, 3)),
    }


def test_tied_parameters_are_promised_once() -> None:
    module = nn.ModuleDict({"embedding": nn.Embedding(5, 2), "head": nn.Linear(2, 5, bias=False)}).to("meta")
    module["head"].weight = module["embedding"].weight
    assert list(promised(module, Optim(type="sgd"))) == ["embedding.weight"]
