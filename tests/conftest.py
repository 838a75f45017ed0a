"""A run's directory as training leaves it, made of small files, for whatever only reads runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raytx.artifact import FORMAT as ARTIFACT_FORMAT
from raytx.artifact import sealed
from raytx.checkpoint import FORMAT
from raytx.export import made_of
from raytx.files import inventory, write_sealed
from raytx.recipe import parse

MakeRun = Callable[..., Path]
BEGAN = 1_800_000_000.0
"""When made runs began; a step takes a second."""


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Make a run below `runs`; dotted values of its recipe are given with two underscores."""

    def make(
        name: str = "one",
        *,
        steps: int = 8,
        done: int | None = None,
        saved: Sequence[int] = (4, 8),
        artifact: bool = True,
        **values: Any,
    ) -> Path:
        run_dir = tmp_path / "runs" / name
        run_dir.mkdir(parents=True)
        plan = make_plan(run_dir, steps, {key.replace("__", "."): value for key, value in values.items()})
        write(run_dir / "plan.json", plan)
        write(run_dir / "environment.json", {"python": "3.11.7", "packages": {"torch": "2.13.0"}})
        log(run_dir, *journal(steps if done is None else done, saved))
        for step in saved:
            make_checkpoint(run_dir, plan, step)
        if artifact and saved:
            make_artifact(run_dir, plan, max(saved))
        return run_dir

    return make


def make_plan(run_dir: Path, steps: int, values: dict[str, Any]) -> dict[str, Any]:
    """Return plan.json of a decoder on text, over data that is prepared here."""
    plain = {
        "name": run_dir.name,
        "storage_path": str(run_dir.parent),
        "model": {"type": "decoder"},
        "data": {"type": "text-files", "path": "corpus"},
        "train": {"steps": steps, "global_batch_size": 4, "micro_batch_size": 2},
        "save": {"keep": "best"},
        "scaling": {"num_workers": 2},
    }
    recipe = parse(plain).override(values).dump()
    return {
        "version": "0.1.0",
        "recipe": recipe,
        "layout": {"data_parallel_size": recipe["scaling"]["num_workers"]},
        "gradient_accumulation_steps": 1,
        "metric": "loss",
        "metric_mode": "min",
        "plugins": {"raytx_torch": "0.1.0"},
        "size": {"parameters": 1000, "trainable": 1000},
        "steps": steps,
        "steps_per_epoch": 4,
        "num_samples": 16,
        "prepared": str(make_data(run_dir.parent / ".cache" / "0badc0de", 16)),
    }


def make_data(directory: Path, samples: int) -> Path:
    if not directory.is_dir():
        directory.mkdir(parents=True)
        table = pa.table({"input_ids": [[1, 2]] * samples, "num_targets": [1] * samples})
        with pa.ipc.new_file(str(directory / "train.arrow"), table.schema) as writer:
            writer.write_table(table)
        write(directory / "prepared.json", {"num_samples": {"train": samples, "test": 0}})
        write(directory / "manifest.json", {"files": inventory(directory)})
    return directory


def journal(done: int, saved: Sequence[int]) -> list[dict[str, Any]]:
    """Return the records of an unbroken run."""
    rows: list[dict[str, Any]] = [
        {"kind": "placed", "step": 0, "nodes": ["alpha", "beta"], "time": BEGAN},
        {"kind": "started", "step": 0, "time": BEGAN},
    ]
    for step in range(1, done + 1):
        rows.append({"kind": "step", "step": step, "loss": 5 - step / 10, "tokens_per_s": 100.0, "time": BEGAN + step})
        if step in saved:
            rows.append({"kind": "eval", "step": step, "loss": 6 - step / 10, "seconds": 0.1, "time": BEGAN + step})
            name = f"step-{step:08d}"
            rows.append({"kind": "checkpoint", "step": step, "name": name, "seconds": 0.1, "time": BEGAN + step})
    return rows


def make_checkpoint(run_dir: Path, plan: dict[str, Any], step: int) -> Path:
    directory = run_dir / "checkpoints" / f"step-{step:08d}"
    directory.mkdir(parents=True)
    loss = 6 - step / 10
    state = {"step": step, "best": loss, "best_step": step, "metric": "loss min", "metrics": {"loss": loss}}
    write(directory / "state.json", state | {"seconds": float(step)})
    write(directory / "plan.json", plan)
    (directory / "weights-00000-00000.safetensors").write_bytes(bytes(range(200)) + bytes([step]))
    write_sealed(directory / "manifest.json", {"format": FORMAT, "step": step, "files": inventory(directory)})
    return directory


def make_artifact(run_dir: Path, plan: dict[str, Any], step: int) -> Path:
    directory = run_dir / "artifacts" / "hf"
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(bytes(300))
    source = json.loads((run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    parts: dict[str, Any] = {"plugins": plan["plugins"], "exporter": {"type": "hf"}, "compression": []}
    name = made_of(source, **parts, serving=plan["recipe"]["serving"])
    lineage = {"run": run_dir.name, "step": step, "checkpoint": f"step-{step:08d}", "made_of": name}
    lineage |= {"plan": "ab12", "recipe": plan["recipe"]}
    told = {"golden_difference": 1e-7, "metrics": {"loss": 5.2}, "format": ARTIFACT_FORMAT, "lineage": lineage}
    model = {"name": run_dir.name, "task": "causal-lm", "model": {"type": "decoder"}}
    write(directory / "artifact.json", sealed(model | parts | told | {"files": inventory(directory)}))
    return directory


def log(run_dir: Path, *records: dict[str, Any]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
