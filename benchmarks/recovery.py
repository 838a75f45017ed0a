"""Time from the kill of a rank to the next step that is done: `raytx train` beside plain Ray Train.

    python benchmarks/recovery.py --rounds 2 --kills 3

Both train the same model on the same samples with DDP on two processes of this machine, save every few steps, and may
restart as often as they need. In turn each is started, and when it does steps one of its ranks, drawn at random, gets
SIGKILL, a few times over. The clock runs from the signal to the row of the next step that new processes did in
metrics.jsonl. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from contest import work
from rich.console import Console
from strategies import recipe

from raytx.journal import FRESH, METRICS, rows
from raytx.plan import Plan, resolve
from raytx.prepare import prepare
from raytx.recipe import parse

HERE = Path(__file__).parent
EVERY = 5
"""Steps between checkpoints."""
SAMPLES_STEPS = 8
"""Steps of which the plain script gets the samples; it does them over and over."""
ENDLESS = 100_000
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
"""Of the model, so that no step takes long: what is measured is how long it takes to come to one."""
LIMIT_S = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="how often each is started, in turn")
    parser.add_argument("--kills", type=int, default=3, help="in each round")
    options = parser.parse_args()
    storage = Path(tempfile.mkdtemp(prefix="rx"))
    dice = random.Random(0)
    try:
        plan = _prepared(storage)
        sides = {"raytx train": raytx_train, "Ray Train": ray_train}
        found: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(options.rounds):
            for name, command in sides.items():
                found[name] += recoveries(*command(plan, storage, number), kills=options.kills, dice=dice)
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    print("| | median, s | of each kill |\n|---|--:|---|")
    for name, seconds in found.items():
        print(f"| {name} | {statistics.median(seconds):.1f} | {', '.join(f'{s:.1f}' for s in seconds)} |")


def _prepared(storage: Path) -> Plan:
    """Prepare the data, and leave arrays and the model's shape for the plain script."""
    plain = _recipe(storage, "prepared", steps=SAMPLES_STEPS)
    plan, _ = prepare(resolve(parse(plain)), Console(quiet=True))
    whole = work(plan, 0)
    np.savez(storage / "samples.npz", **whole.features, num_targets=whole.targets, order=whole.order)
    (storage / "config.json").write_text(json.dumps(plain["model"]["config"]))
    return plan


def _recipe(storage: Path, name: str, *, steps: int) -> dict[str, Any]:
    plain = recipe({"type": "ddp"}, storage, steps=steps, every=steps) | {"name": name, "save": {"every": EVERY}}
    plain["model"]["config"] |= TINY
    plain["scaling"] |= {"max_failures": 100}
    return plain


def raytx_train(plan: Plan, storage: Path, number: int) -> tuple[list[str], Path]:
    """Return the command and where it tells of its steps."""
    plain = _recipe(storage, f"killed{number}", steps=ENDLESS)
    (storage / f"killed{number}.yaml").write_text(yaml.safe_dump(plain))
    return ["-m", "raytx", "train", str(storage / f"killed{number}.yaml")], storage / f"killed{number}" / METRICS


def ray_train(plan: Plan, storage: Path, number: int) -> tuple[list[str], Path]:
    """Return the same of the script beside this one."""
    directory = storage / f"plain{number}"
    directory.mkdir()
    for name in ("samples.npz", "config.json"):
        shutil.copy(storage / name, directory)
    arguments = [str(directory), str(plan.recipe.train.micro_batch_size), str(EVERY)]
    return [str(HERE / "ray_train_script.py"), *arguments], directory / METRICS


def recoveries(command: list[str], metrics: Path, *, kills: int, dice: random.Random) -> list[float]:
    """Start a command, kill one of its ranks a few times, and return the seconds until it did a step again."""
    path = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]  # workers import what the script does
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
            stdout=output,
            stderr=output,
        )
        try:
            return [_recovery(process, metrics, dice) for _ in range(kills)]
        finally:
            _end(process)


def _recovery(process: subprocess.Popen[bytes], metrics: Path, dice: random.Random) -> float:
    attempt = _wait(process, lambda: _attempt(metrics, since=0.0, steps=2 * EVERY))
    time.sleep(dice.uniform(0, 2))
    killed = time.time()
    os.kill(dice.choice(attempt["pids"]), signal.SIGKILL)
    return float(_wait(process, lambda: _attempt(metrics, since=killed, steps=1))["first"] - killed)


def _attempt(metrics: Path, *, since: float, steps: int) -> dict[str, Any] | None:
    """Return the processes and the first step of the last attempt, once it began after a time and has done so many."""
    found = rows(metrics)
    starts = [place for place, row in enumerate(found) if row["kind"] in FRESH and row["time"] > since]
    if not starts:
        return None
    done = [row["time"] for row in found[starts[-1] :] if row["kind"] == "step"]
    pids = [row["pids"] for row in found if row["kind"] == "placed"]
    return {"pids": pids[-1], "first": done[0]} if len(done) >= steps else None


def _wait(process: subprocess.Popen[bytes], look: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    deadline = time.monotonic() + LIMIT_S
    while (found := look()) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"{process.args} does no steps (code {process.poll()})")
        time.sleep(0.05)
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a run as Ctrl-C does, and harder where that does not help."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
