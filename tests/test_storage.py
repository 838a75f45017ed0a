from __future__ import annotations

import hashlib
import os
import threading
import uuid

import pytest

from raytx import storage
from raytx.errors import RecipeError
from raytx.files import CHUNK
from raytx.recipe import parse
from raytx.storage import Store, StoreError

PLAIN = {"name": "one", "model": {"type": "decoder"}, "data": {"type": "text-files", "path": "corpus"}}


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    """A store of fsspec's, and one of pyarrow's; S3 is in integration/test_remote.py."""
    return Store(f"memory://{uuid.uuid4().hex}/runs" if request.param == "memory" else f"file://{tmp_path}/runs")


def test_what_is_put_is_what_is_fetched(store, tmp_path):
    path, data, moved = tmp_path / "here", os.urandom(CHUNK + 7), []
    path.write_bytes(data)
    store.put(path, "a/b/there", advance=moved.append)
    assert moved == [CHUNK, 7]
    assert store.sizes() == {"a/b/there": CHUNK + 7}
    assert store.sizes("a/b") == {"there": CHUNK + 7}
    fetched = tmp_path / "new" / "back"
    assert store.get("a/b/there", fetched) == hashlib.sha256(data).hexdigest()
    assert fetched.read_bytes() == data
    assert [file.name for file in fetched.parent.iterdir()] == ["back"]


def test_what_is_not_there_is_told_apart_from_what_fails(store, tmp_path):
    store.write("a/one", b"1")
    assert store.read("a/none") is None
    assert store.sizes("none") == {}
    with pytest.raises(FileNotFoundError):
        store.get("a/none", tmp_path / "none")
    store.remove("a/none")
    store.remove_directory("none")
    assert store.sizes() == {"a/one": 1}
    with pytest.raises(StoreError):
        Store("s3://bucket/runs?endpoint_override=127.0.0.1:9&scheme=http&region=x").write("one", b"1")


def test_files_and_directories_can_be_removed_and_replaced(store):
    for name in ("a/one", "a/b/two", "c"):
        store.write(name, name.encode())
    store.write("c", b"again")
    assert store.read("c") == b"again"
    store.remove("a/one")
    assert set(store.sizes()) == {"a/b/two", "c"}
    store.remove_directory("a")
    assert set(store.sizes()) == {"c"}


def test_of_a_directory_one_file_is_put_and_fetched_after_all_others(store, tmp_path, monkeypatch):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    for name in ("manifest", "one", "deep/two"):
        (source / name).write_text(name)
    order, put = [], Store.put
    monkeypatch.setattr(
        Store, "put", lambda self, path, name, **more: (order.append(name), put(self, path, name, **more))
    )
    store.put_directory(source, "d", last="manifest")
    assert sorted(order[:2]) == ["d/deep/two", "d/one"]
    assert order[2:] == ["d/manifest"]
    target = tmp_path / "target"
    assert store.get_directory("d", target, last="manifest")
    assert (target / "deep" / "two").read_text() == "deep/two"
    store.remove("d/manifest")
    assert not store.get_directory("d", tmp_path / "other", last="manifest")
    assert not (tmp_path / "other").exists()


def test_what_fails_is_tried_again_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(storage, "PAUSES_S", (0.0, 0.0))
    tries = []

    def fail(times):
        tries.append(times)
        if len(tries) <= times:
            raise StoreError("busy")
        return "done"

    assert storage.persistently(lambda: fail(2)) == "done"
    tries.clear()
    with pytest.raises(StoreError, match="busy"):
        storage.persistently(lambda: fail(3))
    assert len(tries) == 3


def test_a_file_that_is_not_there_is_not_asked_for_again(monkeypatch):
    monkeypatch.setattr(storage, "PAUSES_S", (60.0,))

    def missing():
        raise FileNotFoundError

    with pytest.raises(FileNotFoundError):
        storage.persistently(missing)


def test_all_who_share_a_directory_have_the_same_name_for_it(tmp_path):
    names = []
    threads = [threading.Thread(target=lambda: names.append(storage.token(tmp_path / "here"))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == 16
    assert len(set(names)) == 1
    assert storage.token(tmp_path / "there") not in names
    assert [path.name for path in (tmp_path / "here").iterdir()] == [".place"]


def test_each_uri_has_a_directory_of_its_own_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYTX_CACHE", str(tmp_path))
    uris = ["s3://bucket/runs", "s3://bucket-runs", "s3://bucket/runs?region=eu-west-1", "gs://bucket/runs"]
    found = {storage.directory(uri) for uri in uris}
    assert len(found) == 4
    assert {path.parent for path in found} == {tmp_path}
    assert storage.directory("s3://bucket/runs").name.startswith("s3-bucket-runs-")
    assert storage.directory(str(tmp_path / "plain")) == tmp_path / "plain"
    assert storage.of(str(tmp_path / "plain")) is None


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("s3://AKIA123:geheim@bucket/runs", "no place for credentials.*AWS_SECRET_ACCESS_KEY"),
        ("s3://AKIA123@bucket/runs", "no place for credentials"),
        ("s3://bucket/runs?secret_key=geheim", "no place for credentials"),
        ("abfs://account/runs?sas_token=geheim", "no place for credentials"),
        ("s4://bucket/runs", "no file system for s4://"),
        ("s3://", "names no bucket"),
    ],
)
def test_a_uri_that_cannot_work_or_holds_a_secret_is_refused(uri, why):
    with pytest.raises(RecipeError, match=f"(?s)storage_path.*{why}") as told:
        parse(PLAIN | {"storage_path": uri})
    assert "geheim" not in str(told.value)
    assert "AKIA123" not in str(told.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/a/b",
        "s3://bucket/runs?endpoint_override=127.0.0.1:9000&scheme=http&region=eu-west-1",
        "gs://bucket/runs",
        "hdfs://user@namenode:8020/runs",
        "sftp://host/runs",
        "file:///mnt/runs",
    ],
)
def test_a_uri_that_pyarrow_or_fsspec_knows_is_taken(uri):
    assert parse(PLAIN | {"storage_path": uri}).storage_path == uri


def test_a_runs_uri_is_its_storage_path_and_its_name():
    assert storage.split("s3://b/runs/far?scheme=http") == ("s3://b/runs?scheme=http", "far")
    assert storage.split("gs://b/far/") == ("gs://b", "far")
