"""Runs whose storage is a URI: nothing but the store outlives a node, and nodes share nothing but it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from raytx import artifact, checkpoint, lease, mirror, saving, storage, verify, worker
from raytx import run as run_directory
from raytx.artifact import open_artifact
from raytx.checkpoint import Checkpoint
from raytx.cli import commands
from raytx.errors import ArtifactError, CheckpointError, DataError, RecipeError, ResourceError, TrainingError
from raytx.export import export_again
from raytx.journal import rows
from raytx.plan import Plan, resolve
from raytx.prepare import META, prepare
from raytx.serve import ServeArgs, build_app
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
    for module in (storage, saving):
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
        command, common = [sys.executable, str(RANK)], [str(len(caches)), str(directory / "meet"), str(path)]
        started = [
            subprocess.Popen(
                [*command, str(where), fault if number == len(caches) - 1 else "", str(number), *common],
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


def test_an_upload_that_fails_is_tried_again_and_told(recipe, ranks, uri, tmp_path):
    plan = prepared(recipe("flaky", storage_path=uri, **SCHEDULE))
    codes, log = ranks(plan, tmp_path / "one", fault="fail:weights-")
    assert codes == [0]
    (remark,) = [row["text"] for row in told(log, "remark") if "training waited" not in row["text"]]
    assert "a write of checkpoint step-00000004 failed and was tried again" in remark
    assert "the server is not in the mood" in remark
    assert steps_saved(plan) == [8, 4]


def test_an_upload_that_fails_for_good_stops_the_run_with_the_checkpoint_before(recipe, train_here, uri, monkeypatch):
    run = recipe("refused", storage_path=uri, **SCHEDULE)
    monkeypatch.setattr(Store, "put", _faulty(lambda name: _refuse(name, "step-00000008")))
    with pytest.raises(TrainingError, match="AccessDenied"):
        train_here(run)
    assert steps_saved(resolve(run)) == [4]


def _refuse(name, wanted):
    if wanted in name:
        raise storage.StoreError("AccessDenied")


def _faulty(before):
    put = Store.put

    def faulty(self, path, name, **more):
        before(name)
        put(self, path, name, **more)

    return faulty


def test_a_slow_upload_slows_no_step_but_the_next_save_waits_for_it(recipe, train_here, uri, monkeypatch):
    run = recipe("slow", storage_path=uri, train__steps=12, save__every=6)
    monkeypatch.setattr(Store, "put", _faulty(lambda name: time.sleep(2.0 if "optimizer-" in name else 0)))
    _, log = train_here(run)
    (remark,) = [row["text"] for row in told(log, "remark")]
    assert "training waited" in remark
    assert "until checkpoint step-00000006 was written" in remark
    first, _ = told(log, "checkpoint")
    assert first["seconds"] > 2.0
    assert first["stall_s"] < 1.0
    between = [row["seconds"] for row in told(log, "step") if 6 < row["step"] <= 12]
    assert sum(between) < 2.0


def test_a_save_that_dies_while_it_replaces_one_of_its_step_leaves_that_one_whole(recipe, uri, cache, monkeypatch):
    """A step is saved twice where an order breaks into its evaluation; the second time it has metrics."""
    values = {"train__steps": 6, "save__every": None, "evaluate__every": 6, "storage_path": uri}
    plan = prepared(recipe("twice", **values))
    log: list[dict] = []
    session = worker.Session(rank=0, log=log.append, flush=lambda: None, report=lambda metrics: None)

    def order():
        return worker.Order(1, "save") if any(row.get("step") == 6 for row in log) else worker.Order()

    def dying(name):
        if name.endswith("manifest.json") and any(row["kind"] == "checkpoint" for row in log):
            raise storage.StoreError("gone")

    monkeypatch.setattr(Store, "put", _faulty(dying))
    with pytest.raises(TrainingError, match="could not save"):
        worker.train(plan, replace(session, order=order))
    assert [row["step"] for row in told(log, "checkpoint")] == [6]
    monkeypatch.undo()
    monkeypatch.setenv("RAYTX_CACHE", str(cache))
    shutil.rmtree(cache)
    assert mirror.of(plan).newest().step == 6
    assert len(mirror.of(plan).committed()) == 1


@pytest.mark.parametrize("harm", ["flipped", "gone", "manifest"])
def test_a_damaged_checkpoint_in_the_store_is_passed_over_and_counts_no_more(harm, recipe, train_here, cache, uri):
    run = recipe("damaged", storage_path=uri, **SCHEDULE)
    train_here(run)
    last = mirror.of(resolve(run)).committed()[0]
    weights = f"damaged/{last.place}/weights-00000-00000.safetensors"
    if harm == "gone":
        store_of(uri).remove(weights)
    else:
        spoil(uri, weights if harm == "flipped" else f"damaged/{last.place}/manifest.json")
    shutil.rmtree(cache)
    state, log = train_here(run.override({"save.num_to_keep": 1}))
    assert state.step == 8
    assert [row["step"] for row in told(log, "resumed")] == [4]
    (remark,) = [row["text"] for row in told(log, "remark") if "training waited" not in row["text"]]
    assert remark.startswith(f"checkpoint {last.name} is damaged and passed over: ")
    reason = {"flipped": "its SHA-256 differs", "gone": "weights-00000-00000.safetensors: missing"}
    assert reason.get(harm, "manifest.json") in remark
    saved = mirror.of(resolve(run)).committed()
    assert [one.step for one in saved] == [8]
    assert saved[0].attempt > last.attempt
    assert f"{last.name}/damaged-manifest.json" in objects(uri, "damaged")


def test_a_run_whose_every_checkpoint_is_damaged_does_not_begin_anew(recipe, train_here, cache, uri):
    run = recipe("hopeless", storage_path=uri, train__steps=4, save__every=4)
    train_here(run)
    (only,) = mirror.of(resolve(run)).committed()
    spoil(uri, f"hopeless/{only.place}/weights-00000-00000.safetensors")
    for _ in range(2):
        shutil.rmtree(cache)
        with pytest.raises(TrainingError, match="held checkpoints, and now none that is whole"):
            train_here(run)
    assert steps_saved(resolve(run)) == []


def test_what_is_damaged_on_a_node_is_fetched_anew(recipe, train_here, uri):
    run = recipe("repaired", storage_path=uri, **SCHEDULE)
    train_here(run)
    plan = resolve(run)
    directory = checkpoint.directory_of(plan.run_dir, 8)
    expected = contents(directory)
    weights = directory / "weights-00000-00000.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    (directory / "state.json").unlink()
    (directory / "stranger").touch()
    found = mirror.of(plan).newest()
    assert checkpoint.damage(directory) is None
    assert same(expected, contents(found.directory))


def test_a_node_fetches_what_it_lacks_of_a_checkpoint_and_no_more(recipe, train_here, uri, monkeypatch):
    run = recipe("kept", storage_path=uri, **SCHEDULE)
    train_here(run)
    fetched, get = [], Store.get

    def noting(self, name, *more, **and_):
        fetched.append(name.rpartition("/")[2])
        return get(self, name, *more, **and_)

    monkeypatch.setattr(Store, "get", noting)
    assert mirror.of(resolve(run)).newest().step == 8
    assert fetched == []
    (checkpoint.directory_of(resolve(run).run_dir, 8) / "golden.safetensors").unlink()
    assert mirror.of(resolve(run)).newest().step == 8
    assert fetched == ["golden.safetensors"]


def test_a_store_that_cannot_be_read_stops_a_run_rather_than_set_it_back(recipe, train_here, cache, uri, monkeypatch):
    run = recipe("unreachable", storage_path=uri, **SCHEDULE)
    train_here(run)
    shutil.rmtree(cache / next(cache.iterdir()).name / "unreachable")
    get = Store.get

    def failing(self, name, *more, **and_):
        if "step-00000008" in name:
            raise storage.StoreError("curlCode: 7, Couldn't connect to server")
        return get(self, name, *more, **and_)

    monkeypatch.setattr(Store, "get", failing)
    with pytest.raises(TrainingError, match=r"cannot read s3://.*step-00000008.*Couldn't connect"):
        train_here(run)
    assert steps_saved(resolve(run)) == [8, 4]


def test_the_newest_and_the_best_stay_in_the_store_and_rubbish_does_not(recipe, train_here, uri):
    values = {"train__steps": 12, "evaluate__every": 2, "save__every": 2, "save__num_to_keep": 1, "save__keep": "best"}
    run = recipe("retained", storage_path=uri, evaluate__mode="max", **values)  # the loss falls
    store_of(uri).write("retained/checkpoints/step-00000002.0/weights-00000-00000.safetensors", b"half")
    state, _ = train_here(run)
    assert state.best_step < 12
    assert steps_saved(resolve(run)) == [12, state.best_step]
    assert {name.partition(".")[0] for name in objects(uri, "retained")} == {
        "step-00000012",
        f"step-{state.best_step:08d}",
    }
    assert mirror.of(resolve(run)).chosen(resolve(run)).step == state.best_step


def test_prepared_data_that_is_damaged_in_the_store_is_made_anew(recipe, cache, uri):
    run = recipe("data", storage_path=uri, **SCHEDULE)
    plan = prepared(run)
    name = f".cache/{plan.data_dir.name}"
    spoil(uri, f"{name}/train.arrow")
    shutil.rmtree(cache)
    with pytest.raises(DataError, match="is not whole in s3://"):
        worker.train(plan, worker.Session(rank=0, log=print, flush=lambda: None, report=print))
    again = prepared(run)
    assert again == plan
    assert (again.data_dir / META).is_file()
    shutil.rmtree(cache)
    worker.bring(again)
    assert (again.data_dir / "train.arrow").is_file()


def test_credentials_are_written_nowhere(recipe, ranks, uri, tmp_path):
    plan = prepared(recipe("secret", storage_path=uri, **SCHEDULE))
    with mirror.held(plan, doing="training", tell=print):
        codes, _ = ranks(plan, tmp_path / "cache")
    assert codes == [0]
    files = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    files |= {name: store_of(uri).read(name) or b"" for name in store_of(uri).sizes()}
    assert len(files) > 40
    for name, data in files.items():
        assert KEY.encode() not in data, name
        assert SECRET.encode() not in data, name


def test_a_run_that_learns_something_else_is_refused_where_it_has_never_been(recipe, train_here, cache, uri):
    values = {"storage_path": uri, **SCHEDULE}
    plan = prepared(recipe("other", **values))
    with run_directory.own(plan, mirror.held(plan, doing="training", tell=print)):
        run_directory.record(plan)
        train_here(recipe("other", **values))
    shutil.rmtree(cache)
    other = resolve(recipe("other", **values).override({"optim.lr": 1e-3}))
    with (
        pytest.raises(RecipeError, match="learns something else"),
        run_directory.own(other, mirror.held(other, doing="training", tell=print)),
    ):
        pass


def test_a_bucket_that_is_not_there_is_told_as_a_mistake(recipe, server):
    plan = resolve(recipe("nowhere", storage_path=f"s3://no-such-bucket/runs?{server}"))
    with (
        pytest.raises(ResourceError, match="storage_path: cannot use s3://no-such-bucket"),
        mirror.held(plan, doing="training", tell=print),
    ):
        pass


def at(uri: str, place: str) -> str:
    """Return the URI of something below a storage path."""
    base, _, query = uri.partition("?")
    return f"{base}/{place}?{query}"


@pytest.fixture
def exported(recipe, train_here, uri, cache) -> str:
    """A finished run in a store, exported from a machine that had nothing of it."""
    train_here(recipe("run", storage_path=uri, export=[{"type": "hf"}], **SCHEDULE))
    plan = prepared(recipe("run", storage_path=uri, export=[{"type": "hf"}], **SCHEDULE))
    run_directory.record(plan)
    mirror.of(plan).push(mirror.RECORDS)
    shutil.rmtree(cache)
    export_again(at(uri, "run"), tell=print)
    return uri


def test_an_artifact_in_a_store_is_opened_on_a_node_that_has_nothing(exported, cache):
    place = at(exported, "run/artifacts/hf")
    shutil.rmtree(cache)
    opened = open_artifact(place)  # replays the golden outputs
    assert opened.artifact.lineage["step"] == 8
    before = {path: path.stat().st_mtime_ns for path in artifact.located(place).rglob("*")}
    open_artifact(place)
    assert before == {path: path.stat().st_mtime_ns for path in artifact.located(place).rglob("*")}
    assert ServeArgs.model_validate({"directory": place}).directory == place
    assert build_app(ServeArgs(directory=place)) is not None


def test_a_damaged_artifact_in_a_store_is_refused_and_one_published_anew_is_fetched(exported, cache):
    place = at(exported, "run/artifacts/hf")
    spoil(exported, "run/artifacts/hf/model.safetensors")
    shutil.rmtree(cache)
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"artifacts/hf.*: not what was published. model.safetensors"):
            open_artifact(place)
    assert list(cache.glob("*artifacts-hf*/*")) == [], "nothing damaged is kept"
    plan = mirror.recorded(at(exported, "run"))
    mirror.of(plan)._store.remove("run/artifacts/hf/artifact.json")
    with pytest.raises(ArtifactError, match=r"no artifact there \(no artifact.json\)"):
        open_artifact(place)
    export_again(at(exported, "run"), tell=print)
    assert open_artifact(place).artifact.lineage["step"] == 8


def test_a_run_in_a_store_is_consolidated_by_its_uri(exported, tmp_path):
    with pytest.raises(SystemExit) as end:
        commands(["consolidate", at(exported, "run"), str(tmp_path / "whole")])
    assert end.value.code == 0
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    there = load_file(artifact.located(at(exported, "run/artifacts/hf")) / "model.safetensors")
    assert same(weights, there)


def test_a_uri_that_names_nothing_or_cannot_be_reached_is_told(uri):
    with pytest.raises(CheckpointError, match=r"no run there \(no plan.json\)"):
        export_again(at(uri, "nothing"), tell=print)
    with pytest.raises(ArtifactError, match="no artifact there"):
        artifact.read(at(uri, "nothing"))
    dead = re.sub(r"endpoint_override=[^&]*", "endpoint_override=127.0.0.1:9", uri)
    with pytest.raises(ResourceError, match="cannot be read"):
        artifact.read(at(f"{dead}&connect_timeout=1", "nothing"))


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_whose_machine_is_gone_goes_on_from_another_with_the_same_command(recipe, uri, tmp_path):
    values = {"storage_path": uri, "strategy": {"type": "ddp"}, "scaling__num_workers": 2, "export": [{"type": "hf"}]}
    values |= {"train__steps": 160, "save__every": 20}
    for name in ("whole", "moved"):
        (tmp_path / f"{name}.yaml").write_text(recipe(name, **values).to_yaml())
    assert "done at step 160" in _command(tmp_path, "whole", cache="one").communicate(timeout=240)[0]
    lost = _command(tmp_path, "moved", cache="one")
    while not steps_saved(resolve(recipe("moved", **values))):
        assert lost.poll() is None
        time.sleep(0.1)
    lost.kill()
    lost.wait()
    said = _command(tmp_path, "moved", cache="two").communicate(timeout=240)[0]
    assert "is gone; this run is taken over" in said
    assert re.search(r"resumed from checkpoint step-00000\d\d0", said)
    assert "done at step 160" in said
    whole, moved = (resolve(recipe(name, **values)) for name in ("whole", "moved"))
    assert same(_restored(whole, tmp_path / "look", step=160), _restored(moved, tmp_path / "look", step=160))
    (journal,) = (tmp_path / "two").glob("*/moved/metrics.jsonl")
    assert [row["step"] for row in rows(journal) if row["kind"] == "step"] == list(range(1, 161))
    assert "moved/artifacts/hf/artifact.json" in store_of(uri).sizes()
    assert [verdict.problems for verdict in map(verify.verify, mirror.copies(uri, whole=True).iterdir())] == [[], []]


def _command(directory, name, *, cache):
    """Start to train on a machine, which is a cache and a Ray of its own."""
    environment = os.environ | {"RAYTX_CACHE": str(directory / cache), "RAY_TMPDIR": tempfile.mkdtemp(prefix="rx")}
    return subprocess.Popen(
        [sys.executable, "-m", "raytx", "train", str(directory / f"{name}.yaml")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
