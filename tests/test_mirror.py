from __future__ import annotations

import os

import pytest

from raytx import mirror, storage
from raytx.errors import TrainingError
from raytx.mirror import JOURNAL, RECORDS, Mirror, Saved
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


def committed(store, *names):
    for name in names:
        for file in ("weights-0", "manifest.json"):
            store.write(f"run/checkpoints/{name}/{file}", b"{}")


def there(store):
    return sorted({name.partition("/")[0] for name in store.sizes("run/checkpoints")})


@pytest.fixture
def empty(tmp_path):
    return Mirror(Store(f"file://{tmp_path}/empty"), tmp_path / "here" / "run")


def test_retention_keeps_the_newest_and_the_best_of_what_is_not_ahead(empty):
    store = empty._store
    committed(store, "step-00000002.a1", "step-00000004.a2", "step-00000006.a3", "step-00000006.a4", "step-00000009.a1")
    store.write("run/checkpoints/step-00000007.a2/weights-0", b"half")
    store.write("run/checkpoints/step-00000003.a1/damaged-manifest.json", b"{}")
    empty.retain(Saved(6, "a4"), num_to_keep=1, best_step=2)
    kept = ["step-00000002.a1", "step-00000003.a1", "step-00000006.a4", "step-00000009.a1"]
    assert there(store) == kept, "damaged ones are left to be looked at, and what is ahead may be whole"


def test_an_attempt_that_was_given_up_touches_nothing_of_its_successor(empty):
    store = empty._store
    committed(store, "step-00000002.a1", "step-00000004.b0", "step-00000006.a1")
    store.write("run/checkpoints/step-00000008.b0/weights-0", b"half")
    empty.retain(Saved(6, "a1"), num_to_keep=1, best_step=None)
    assert there(store) == ["step-00000004.b0", "step-00000006.a1", "step-00000008.b0"]


def test_the_greatest_attempt_is_of_uploads_that_were_cut_off_too(empty):
    assert empty.greatest_attempt() == 0
    committed(empty._store, "step-00000002.18c2f0a1d2e3f405000001")
    empty._store.write("run/checkpoints/step-00000004.18c2f0a1d2e3f406000003/weights-0", b"half")
    assert empty.greatest_attempt() == 0x18C2F0A1D2E3F406


def test_a_store_that_cannot_be_asked_for_it_stops_the_run_in_words(empty, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES_S", ())
    monkeypatch.setattr(Store, "sizes", lambda *_: (_ for _ in ()).throw(storage.StoreError("the server is away")))
    with pytest.raises(TrainingError, match=r"cannot read file:.*: the server is away. Repair the storage"):
        empty.greatest_attempt()


def test_a_copy_has_of_several_checkpoints_of_a_step_the_last(empty):
    committed(empty._store, "step-00000004.a1", "step-00000004.a2")
    empty._store.write("run/checkpoints/step-00000004.a2/weights-0", b"last")
    for attempt in ("a3", "a4"):
        empty._store.write(f"run/checkpoints/step-00000008.{attempt}/damaged-manifest.json", attempt.encode())
    copy = mirror.copies(empty._store.uri, whole=True) / "run" / "checkpoints"
    assert (copy / "step-00000004" / "weights-0").read_bytes() == b"last"
    assert (copy / "damaged-step-00000008" / "damaged-manifest.json").read_bytes() == b"a4"


def test_a_node_drops_checkpoints_that_the_store_retains_no_longer(empty):
    committed(empty._store, "step-00000008.a1")
    for step in (4, 8):
        directory = empty._run_dir / "checkpoints" / f"step-{step:08d}"
        directory.mkdir(parents=True)
        (directory / "manifest.json").touch()
    empty._begin()
    assert {path.name for path in (empty._run_dir / "checkpoints").iterdir()} == {"step-00000008"}


def test_where_the_store_has_none_left_a_node_keeps_what_it_has(empty):
    directory = empty._run_dir / "checkpoints" / "step-00000004"
    directory.mkdir(parents=True)
    (directory / "manifest.json").touch()
    empty._begin()
    assert directory.is_dir()


def test_a_node_keeps_one_share_of_checkpoints_that_others_completed(tmp_path):
    for step, whole in ((4, True), (8, False), (12, False)):
        directory = tmp_path / "checkpoints" / f"step-{step:08d}"
        directory.mkdir(parents=True)
        (directory / ("manifest.json" if whole else "weights-00001-00000.safetensors")).touch()
    mirror.tidy(tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000004", "step-00000012"}
