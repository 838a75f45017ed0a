"""Saves: what one costs the training, in the background and not, beside a plain copy of the same bytes; and resuming.

    python benchmarks/saving.py --steps 100 --every 20

One rank trains a decoder with some 100 MB of weights and moments, once with save.background and once without, the model
and the steps being the same. After each save its files are copied, and the copies synchronised, in the same process: so
a save and a copy meet the same disk at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from raytx import checkpoint, files, worker
from raytx.plan import Plan, resolve
from raytx.prepare import prepare
from raytx.testing import tiny_recipe

MODEL = {
    "type": "decoder", "hidden_size": 256, "num_hidden_layers": 10, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 768, "max_position_embeddings": 256, "vocab_size": 320,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--storage", default=None, help="where to save; a directory of the disk that is to be measured")
    options = parser.parse_args()
    storage = Path(tempfile.mkdtemp(prefix="raytx-saving-", dir=options.storage))
    try:
        for background in (True, False):
            plan = planned(storage, options.steps, options.every, background=background)
            print(json.dumps({"background": background, **measured(plan)}), flush=True)
        print(json.dumps({"resume_s": round(resumed(plan), 3)}))
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def planned(storage: Path, steps: int, every: int, *, background: bool) -> Plan:
    recipe = tiny_recipe(
        name="background" if background else "waiting",
        storage_path=str(storage),
        model=MODEL,
        train={"steps": steps, "global_batch_size": 16, "micro_batch_size": 16, "max_length": 64},
        save={"every": every, "background": background},
    )
    return prepare(resolve(recipe), Console(quiet=True))[0]


def measured(plan: Plan) -> dict[str, Any]:
    """Train; return what saves took. A step counts as one beside a save where one was under way when it began."""
    steps: dict[bool, list[float]] = {True: [], False: []}
    saves: list[dict[str, Any]] = []
    state = {"saving": False, "copying": 0.0}

    def take(row: dict[str, Any]) -> None:
        if row["kind"] == "checkpoint":
            copy_s, size = copied(checkpoint.directory_of(plan.run_dir, row["step"]), plan.run_dir / "copy")
            saves.append({**row, "copy_s": copy_s, "bytes": size})
            state.update(saving=False, copying=state["copying"] + copy_s)
        if row["kind"] == "step":
            steps[bool(state["saving"])].append(row["seconds"])
            state["saving"] = state["saving"] or row["step"] % plan.recipe.save.every == 0

    started = time.monotonic()
    worker.train(plan, worker.Session(rank=0, log=take, flush=lambda: None, report=lambda metrics: None))
    run_s = time.monotonic() - started - state["copying"]
    return figures(saves, steps, run_s)


def figures(saves: list[dict[str, Any]], steps: dict[bool, list[float]], run_s: float) -> dict[str, Any]:
    usual, stall = statistics.median(steps[False]), statistics.median(row["stall_s"] for row in saves)
    return {
        "megabytes": round(saves[0]["bytes"] / 1e6, 1),
        "step_ms": round(1000 * usual),
        "step_beside_a_save_ms": round(1000 * statistics.median(steps[True])) if steps[True] else None,
        "stall_ms": round(1000 * stall),
        "stall_of_a_step": round(stall / usual, 3),
        "stall_of_the_run": round(sum(row["stall_s"] for row in saves) / run_s, 4),
        "save_s": round(statistics.median(row["seconds"] for row in saves), 3),
        "copy_s": round(statistics.median(row["copy_s"] for row in saves), 3),
        "throughput_of_a_copy": round(statistics.median(row["copy_s"] / row["seconds"] for row in saves), 3),
    }


def copied(source: Path, target: Path) -> tuple[float, int]:
    """Copy a directory's files and wait until the disk has them; return seconds and bytes."""
    started = time.monotonic()
    for path in files.walk(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        files.sync(copy)
    files.sync_directory(target)
    seconds = time.monotonic() - started
    size = sum(path.stat().st_size for path in files.walk(target))
    shutil.rmtree(target)
    return seconds, size


def resumed(plan: Plan) -> float:
    """Return the seconds between the start of looking for a checkpoint and having it loaded."""
    restore, took = worker.restore, []

    def timed(*args: Any) -> worker.State:
        started = time.monotonic()
        try:
            return restore(*args)
        finally:
            took.append(time.monotonic() - started)

    worker.restore = timed
    longer = replace(plan, steps=(plan.steps or 0) + 1)
    worker.train(longer, worker.Session(rank=0, log=lambda row: None, flush=lambda: None, report=lambda metrics: None))
    return took[0]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
