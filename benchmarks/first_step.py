"""Time from the command to the first step: `raytx train` beside `accelerate launch` of a script with Trainer.

    python benchmarks/first_step.py --runs 3

Both train the same model on two processes of this machine; the data are prepared. Each command is started in turn, and
the clock runs from its start until its first optimizer update is done. Prints a Markdown table of medians and of all
runs, and the median time of a step afterwards. Needs `pip install accelerate`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from contest import work
from rich.console import Console
from strategies import RANKS, recipe

from raytx.journal import METRICS, rows
from raytx.plan import Plan, resolve
from raytx.prepare import prepare
from raytx.recipe import parse

HERE = Path(__file__).parent
STEPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of each command, taken in turn")
    options = parser.parse_args()
    storage = Path(tempfile.mkdtemp(prefix="raytx-first-step-"))
    try:
        commands = {"raytx train": raytx_train, "accelerate launch": accelerate_launch}
        plan = _prepared(storage)
        found = [{name: run(plan, storage, number) for name, run in commands.items()} for number in range(options.runs)]
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    print("| command | to first step, s | of each run | later steps, ms |\n|---|--:|---|--:|")
    for name in commands:
        firsts, later = zip(*(run[name] for run in found), strict=True)
        each = ", ".join(f"{first:.1f}" for first in firsts)
        print(f"| {name} | {statistics.median(firsts):.1f} | {each} | {statistics.median(later) * 1000:.0f} |")


def _prepared(storage: Path) -> Plan:
    """Prepare the data, and leave a recipe for one command and arrays for the other."""
    plain = recipe({"type": "ddp"}, storage, steps=STEPS, every=STEPS)
    (storage / "recipe.yaml").write_text(yaml.safe_dump(plain))
    plan, _ = prepare(resolve(parse(plain)), Console(quiet=True))
    whole = work(plan, 0)
    np.savez(storage / "samples.npz", **whole.features, num_targets=whole.targets, order=whole.order)
    (storage / "config.json").write_text(json.dumps(plain["model"]["config"]))
    return plan


def raytx_train(plan: Plan, storage: Path, number: int) -> tuple[float, float]:
    """Return seconds to the first step and the median of those after it."""
    started = time.time()
    _call(["-m", "raytx", "train", str(storage / "recipe.yaml"), f"name=run{number}"], storage)
    steps = [row for row in rows(storage / f"run{number}" / METRICS) if row["kind"] == "step"]
    later = statistics.median(row["seconds"] for row in steps[1:])
    return steps[0]["time"] - started, later


def accelerate_launch(plan: Plan, storage: Path, number: int) -> tuple[float, float]:
    """Return the same of the script below."""
    started = time.time()
    # With --cpu it would start one process unless there is MPI; several come from torch's launcher, called so.
    options = ["--multi_gpu", "--num_processes", str(RANKS), "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_ip", "127.0.0.1"]
    script = [str(HERE / "trainer_script.py"), str(storage), str(plan.recipe.train.micro_batch_size)]
    _call(["-m", "accelerate.commands.launch", *options, *script], storage)
    times = json.loads((storage / "times.json").read_text())
    return times[0] - started, statistics.median(np.diff(times))


def _call(arguments: list[str], directory: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=directory, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\n{' '.join(arguments)} failed")


if __name__ == "__main__":
    main()
