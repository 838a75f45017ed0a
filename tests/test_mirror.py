from __future__ import annotations

import os

import pytest

from raytx import mirror
from raytx.mirror import JOURNAL, RECORDS, Mirror
from raytx.storage import Store


@pytest.fixture
def store(tmp_path):
    """A run with a checkpoint, a damaged one and one whose upload was cut off."""
    found = Store(f"file://{tmp_path}/store")
    for name, data in {
        "run/plan.json": b"{}",
        "run/lease": b"{}",
        "run/metrics.jsonl": b"{}\n",
        "run/tensorboard/events": b"e",
        "run/stalls/one.txt": b"s",
        "run/checkpoints/step-00000004.a1/manifest.json": b"{}",
        "run/checkpoints/step-00000004.a1/processor/vocab": b"v",
        "run/checkpoints/step-00000004.a1/weights-0": bytes(100_000),
        "run/checkpoints/step-00000008.a2/damaged-manifest.json": b"{}",
        "run/checkpoints/step-00000012.a3/weights-0": b"half",
        ".cache/key/prepared.json": b"{}",
    }.items():
        found.write(name, data)
    os.utime(tmp_path / "store" / "run" / "lease", (2_000_000_000, 2_000_000_000))
    return found


def names(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("whole", [True, False])
def test_a_copy_is_what_a_storage_directory_would_hold(store, whole):
    copy = mirror.copies(store.uri, whole=whole)
    checkpoint = "run/checkpoints/step-00000004"
    assert names(copy) == {
        "run/plan.json",
        "run/lease",
        "run/metrics.jsonl",
        "run/tensorboard/events",
        "run/stalls/one.txt",
        f"{checkpoint}/manifest.json",
        f"{checkpoint}/processor/vocab",
        f"{checkpoint}/weights-0",
        "run/checkpoints/damaged-step-00000008/damaged-manifest.json",
    }
    weights = (copy / checkpoint / "weights-0").stat()
    assert weights.st_size == 100_000
    assert (weights.st_blocks > 0) == whole


def test_a_copy_is_as_old_as_what_is_there_and_a_renewed_lease_makes_it_active(store):
    copy = mirror.copies(store.uri)
    assert (copy / "run").stat().st_mtime == 2_000_000_000
    assert (copy / "run" / "checkpoints").stat().st_mtime < 2_000_000_000


def test_a_copy_of_one_run_leaves_the_others_out(store):
    store.write("other/plan.json", b"{}")
    assert {path.name for path in mirror.copies(store.uri, only="run").iterdir()} == {"run"}
    assert {path.name for path in mirror.copies(store.uri, only="unknown").iterdir()} == {"run", "other"}


def test_records_and_journal_go_there_when_they_have_changed_and_the_lease_never_does(store, tmp_path, monkeypatch):
    run_dir, put, pushed = tmp_path / "here" / "run", Store.put, []

    def noting(self, path, name, **more):
        pushed.append(name)
        put(self, path, name, **more)

    monkeypatch.setattr(Store, "put", noting)
    here = Mirror(store, run_dir)
    here.pull(RECORDS)
    assert names(run_dir) == {"plan.json", "stalls/one.txt"}
    here.pull(JOURNAL)
    assert names(run_dir) == {"plan.json", "stalls/one.txt", "metrics.jsonl", "tensorboard/events"}
    here.push((*RECORDS, *JOURNAL))
    pushed.clear()
    (run_dir / "metrics.jsonl").write_text("{}\n{}\n")
    (run_dir / "lease").write_text("not mine to give")
    here.push((*RECORDS, *JOURNAL))
    assert pushed == ["run/metrics.jsonl"]


def test_a_journal_that_is_longer_here_is_not_fetched_where_only_longer_ones_are_wanted(store, tmp_path):
    run_dir = tmp_path / "here" / "run"
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("{}\n{}\n")
    Mirror(store, run_dir).pull(JOURNAL, grown=True)
    assert (run_dir / "metrics.jsonl").read_text() == "{}\n{}\n"
    Mirror(store, run_dir).pull(JOURNAL)
    assert (run_dir / "metrics.jsonl").read_text() == "{}\n"


def test_a_node_keeps_one_share_of_checkpoints_that_others_completed(tmp_path):
    for step, whole in ((4, True), (8, False), (12, False)):
        directory = tmp_path / "checkpoints" / f"step-{step:08d}"
        directory.mkdir(parents=True)
        (directory / ("manifest.json" if whole else "weights-00001-00000.safetensors")).touch()
    mirror.tidy(tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000004", "step-00000012"}
