"""A run that was really trained and exported verifies, and what was done to it since is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from raytx import run, worker
from raytx.artifact import GOLDEN, Golden, sealed
from raytx.export import export
from raytx.files import inventory
from raytx.journal import Journal
from raytx.plan import resolve
from raytx.prepare import prepare
from raytx.runs import details, summary
from raytx.verify import verify


@pytest.fixture(scope="module")
def trained(recipe) -> Path:
    plan = resolve(recipe("verified", train__steps=6, save__every=3, save__keep="best", export=[{"type": "hf"}]))
    with run.own(plan) as run_dir, Journal(run_dir) as journal:
        plan, _ = prepare(plan, Console(quiet=True))
        run.record(plan)
        log = lambda record: journal.take([record])  # noqa: E731
        worker.train(
            plan, worker.Session(rank=0, log=log, flush=lambda: None, report=lambda metrics: None, node="here")
        )
        export(run_dir)
    return run_dir


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / trained.name)


def test_what_was_trained_and_exported_is_well_also_when_it_is_replayed(trained):
    verdict = verify(trained, replay=True)
    assert (verdict.problems, verdict.notes) == ([], [])
    assert (verdict.checkpoints, verdict.artifacts, verdict.steps) == (2, 1, 6)
    assert summary(trained).state == "finished"
    assert details(trained)["attempts"][0]["nodes"] == {"here": 1}


def test_a_flipped_bit_is_found_in_every_file_of_checkpoints_artifacts_and_prepared_data(copy):
    for path in sorted((*copy.rglob("checkpoints/*/**/*"), *copy.rglob("artifacts/*/**/*"))):
        if not path.is_file() or not path.stat().st_size:
            continue
        whole, place = path.read_bytes(), path.stat().st_size // 2
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert [found for found in verify(copy).problems if Path(found.file).name == path.name], path
        path.write_bytes(whole)
    assert verify(copy).problems == []


def test_an_artifact_that_answers_otherwise_is_found_by_a_replay_alone(copy):
    artifact = copy / "artifacts" / "hf"
    golden = Golden.load(artifact / GOLDEN)
    Golden(golden.features, golden.logits + 1).save(artifact / GOLDEN)
    manifest = json.loads((artifact / "artifact.json").read_text())
    manifest["files"] = inventory(artifact, exclude=frozenset({"artifact.json"}))
    (artifact / "artifact.json").write_text(json.dumps(sealed(manifest)))
    assert verify(copy).problems == []
    (problem,) = verify(copy, replay=True).problems
    assert problem.file == "artifacts/hf"
    assert "max_difference" in problem.reason
