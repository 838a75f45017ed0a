"""Runs whose storage is a URI: nothing but the store outlives a node, and nodes share nothing but it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from raytx import lease, mirror, storage
from raytx.checkpoint import Checkpoint
from raytx.plan import Plan, resolve
from raytx.prepare import prepare
from raytx.storage import Store

RANK = Path(__file__).with_name("remote_rank.py")
KEY, SECRET = "AKIARAYTXTESTONLY", "raytx-test-secret-0123456789"
SCHEDULE = {"train__steps": 8, "save__every": 4, "save__num_to_keep": None}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server that speaks S3, on loopback, with credentials in the environment."""
    moto = pytest.importorskip("moto.server")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        running.start()
        host, port = running.get_host_and_port()
        yield f"endpoint_override={host}:{port}&scheme=http"
        running.stop()


@pytest.fixture
def uri(server: str) -> str:
    """A storage path in a bucket of its own."""
    from pyarrow import fs

    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    files, _ = fs.FileSystem.from_uri(f"s3://{bucket}?{server}&allow_bucket_creation=true")
    files.create_dir(bucket)
    return f"s3://{bucket}/runs?{server}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """This node's cache."""
    monkeypatch.setenv("RAYTX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    for module in (storage, __import__("raytx.saving").saving):
        monkeypatch.setattr(module, "PAUSES_S", (0.01, 0.02, 0.03))
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    monkeypatch.setattr(lease, "STALE_S", 0.6)
    monkeypatch.setattr(lease, "SETTLE_S", 0.05)


@pytest.fixture
def ranks(tmp_path):
    """Train a plan on one rank a node, each with the cache given; return exit codes and what each logged."""

    def run(plan: Plan, *caches: Path, fault: str = "") -> tuple[list[int], list[dict]]:
        directory = tmp_path / uuid.uuid4().hex
        directory.mkdir()
        path = directory / "plan.json"
        path.write_text(json.dumps(plan.to_dict()))
        log = path.with_suffix(".jsonl")
        environment = os.environ | {"RAYTX_OMITTED": "[0]", "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                [sys.executable, str(RANK), str(where), fault if number == len(caches) - 1 else "", str(number)]
                + [str(len(caches)), str(directory / "meet"), str(path)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for number, where in enumerate(caches)
        ]
        outputs = [process.communicate(timeout=200)[0] for process in started]
        print(*outputs)
        rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
        return [process.returncode for process in started], rows

    return run


def prepared(recipe) -> Plan:
    return prepare(resolve(recipe), Console(quiet=True))[0]


def contents(path: Path) -> dict[str, np.ndarray]:
    found = Checkpoint(path)
    found._open()
    return {key: file.get_tensor(key) for key, file in found._places.items()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(value, other[key]) for key, value in one.items())


def told(log, kind):
    return [row for row in log if row["kind"] == kind]


def store_of(uri: str) -> Store:
    found = storage.of(uri)
    assert found is not None
    return found


def objects(uri: str, name: str) -> dict[str, int]:
    return store_of(uri).sizes(f"{name}/checkpoints")


def steps_saved(plan: Plan) -> list[int]:
    return [saved.step for saved in mirror.of(plan).committed()]


def forget_last(plan: Plan) -> None:
    """Put a run in a store back to the checkpoint before its last."""
    (last, *_) = mirror.of(plan).committed()
    store_of(plan.recipe.storage_path).remove_directory(f"{plan.recipe.name}/{last.place}")


def spoil(uri: str, name: str) -> None:
    """Flip a bit in the last byte but four of an object."""
    data = bytearray(store_of(uri).read(name) or b"")
    data[-5] ^= 1
    store_of(uri).write(name, bytes(data))


@pytest.mark.parametrize("kind", ["s3", "memory", "file"])
def test_a_run_whose_node_is_lost_goes_on_elsewhere_to_the_same_bits(
    kind, recipe, train_here, cache, tmp_path, request
):
    uri = {"memory": f"memory://{uuid.uuid4().hex}/runs", "file": f"file://{tmp_path}/mounted"}.get(kind)
    uri = uri or request.getfixturevalue("uri")
    run = recipe("moved", storage_path=uri, **SCHEDULE)
    train_here(run)
    last = resolve(run).run_dir / "checkpoints" / "step-00000008"
    expected = contents(last)
    forget_last(resolve(run))
    shutil.rmtree(cache)
    state, log = train_here(run)
    assert state.step == 8
    assert [row["step"] for row in told(log, "resumed")] == [4]
    assert same(expected, contents(last))


def test_two_nodes_that_share_nothing_but_the_store_save_and_restore(recipe, ranks, uri, tmp_path):
    values = {"scaling__num_workers": 2, "strategy": {"type": "fsdp"}, **SCHEDULE}
    plan = prepared(recipe("nodes", storage_path=uri, **values))
    codes, _ = ranks(plan, tmp_path / "one", tmp_path / "two")
    assert codes == [0, 0]
    expected = _restored(plan, tmp_path / "look", step=8)
    held = [
        sorted(path.name for path in (tmp_path / node).glob("*/nodes/checkpoints/step-00000008/weights-*"))
        for node in ("one", "two")
    ]
    assert held == [["weights-00000-00000.safetensors"], ["weights-00001-00000.safetensors"]]
    forget_last(plan)
    shutil.rmtree(tmp_path / "two")
    codes, log = ranks(plan, tmp_path / "one", tmp_path / "three")
    assert codes == [0, 0]
    assert [row["step"] for row in told(log, "resumed")] == [4]
    assert same(expected, _restored(plan, tmp_path / "look-again", step=8))


def _restored(plan, cache, step):
    """Return the tensors of the newest checkpoint, as a node that has nothing fetches it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYTX_CACHE", str(cache))
        found = mirror.of(plan).newest()
        assert found.step == step
        return contents(found.directory)


@pytest.mark.parametrize(
    ("at", "saved"),
    [(r"step-00000008.*/optimizer-", [4]), (r"step-00000008.*/manifest", [4]), (r"step-00000004.*/state", [])],
)
def test_a_node_killed_in_the_midst_of_an_upload_leaves_the_checkpoint_before(recipe, ranks, uri, tmp_path, at, saved):
    plan = prepared(recipe("killed", storage_path=uri, **SCHEDULE))
    codes, _ = ranks(plan, tmp_path / "one", fault=f"die:{at}")
    assert codes == [-9]
    assert steps_saved(plan) == saved
    codes, log = ranks(plan, tmp_path / "two")
    assert codes == [0]
    assert [row["step"] for row in told(log, "resumed")] == saved
    assert steps_saved(plan) == [8, 4]
