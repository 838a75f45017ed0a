"""Time of a step under each strategy, beside the same training written directly on the library that it stands on.

    python benchmarks/strategies.py
    python benchmarks/strategies.py --only fsdp "torch FSDP2" --blocks 20

Prints a Markdown table. Two ranks on the CPU, fp32, accumulation and clipping on. In one process group raytx and the
other take turns of a few steps each (contest.py), so both meet the same machine; a ratio is the median over such pairs
of turns, its range holds 90 % of what the median comes to when pairs are drawn anew. Besides the time on the wall there
is rank 0's CPU time, which minds far less what else the machine does. Both start from the same weights and see the same
samples: by how much their losses differ at most stands in the last column. accelerate is needed for the row that is
called after it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from raytx.plan import Plan, resolve
from raytx.prepare import prepare
from raytx.recipe import parse

HERE = Path(__file__).parent
RANKS = 2
LOSSES_DIFFER = 1e-3
"""Relative; above it the two sides cannot have done the same work, and their times say nothing."""


class Case(NamedTuple):
    """A strategy and its counterpart."""

    strategy: dict[str, Any]
    by_hand: str

    @property
    def name(self) -> str:
        of = {"stage": "stage {}", "pipeline_parallel_size": "pipeline {}"}
        return ", ".join(
            [self.strategy["type"], *(text.format(self.strategy[k]) for k, text in of.items() if k in self.strategy)]
        )


CASES = [
    Case({"type": "ddp"}, "accelerate + Trainer"),
    Case({"type": "ddp"}, "torch DDP"),
    Case({"type": "fsdp"}, "torch FSDP2"),
    Case({"type": "deepspeed", "stage": 1}, "bare DeepSpeed, stage 1"),
    Case({"type": "deepspeed", "stage": 2}, "bare DeepSpeed, stage 2"),
    Case({"type": "deepspeed", "stage": 3}, "bare DeepSpeed, stage 3"),
    Case({"type": "deepspeed-3d", "pipeline_parallel_size": RANKS}, "bare PipelineModule"),
]


def main() -> None:
    options = _options()
    print("| raytx | ms | by hand | ms | ratio | 90 % range | CPU ratio | 90 % range | losses differ by |")
    print("|---|--:|---|--:|--:|---|--:|---|---|", flush=True)
    storage = Path(tempfile.mkdtemp(prefix="raytx-strategies-"))
    try:
        for case in CASES:
            if not options.only or {case.strategy["type"], case.name, case.by_hand} & set(options.only):
                print(row(case, contest(case, storage, steps=options.steps, blocks=options.blocks)), flush=True)
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--blocks", type=int, default=15, help="turns of each side, after one to warm up")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="type or name of a strategy, or its counterpart's")
    return parser.parse_args()


def recipe(strategy: dict[str, Any], storage: Path, *, steps: int, every: int) -> dict[str, Any]:
    """A Llama small enough that a step of 16 x 128 tokens takes about a second on two cores."""
    shape = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    size = {"intermediate_size": 688, "vocab_size": 2048, "max_position_embeddings": 256, "tie_word_embeddings": False}
    return {
        "name": "strategies",
        "storage_path": str(storage),
        "model": {
            "type": "hf",
            "task": "causal-lm",
            "config": {"model_type": "llama", **shape, **size},
            "tokenizer": {"train": "bpe", "vocab_size": 2048},
        },
        "data": {"type": "text-files", "path": "stdlib", "max_bytes": 2_000_000, "split": {"test": 0.2}},
        "strategy": strategy,
        "optim": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "schedule": "constant", "max_grad_norm": 0.5},
        "train": {"steps": steps, "global_batch_size": 16, "micro_batch_size": 4, "max_length": 128},
        "evaluate": {"every": every, "max_samples": 1},
        "scaling": {"num_workers": RANKS},
    }


def contest(case: Case, storage: Path, *, steps: int, blocks: int) -> dict[str, Any]:
    """Run both sides and return their times and losses; the first turns are still among them."""
    turns = blocks + 1
    plan, _ = prepare(
        resolve(parse(recipe(case.strategy, storage, steps=turns * steps, every=steps))), Console(quiet=True)
    )
    directory = Path(tempfile.mkdtemp(dir=storage))
    job, result = directory / "job.json", directory / "result.json"
    job.write_text(json.dumps({"plan": plan.to_dict(), "by_hand": case.by_hand, "steps": steps, "blocks": turns}))
    _run_ranks(plan, directory, job, result)
    return json.loads(result.read_text())


def _run_ranks(plan: Plan, directory: Path, job: Path, result: Path) -> None:
    """Start a process for each rank and wait for all; end the others when one fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | plan.recipe.strategy.environment(use_gpu=False)
    fixed = [str(plan.world_size), str(directory / "rendezvous"), str(job), str(result)]
    logs = [directory / f"rank{rank}.log" for rank in range(plan.world_size)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(HERE / "contest.py"), str(rank), *fixed]
        with log.open("w") as out:
            processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=directory))
    try:
        for process, log in zip(processes, logs, strict=True):
            if process.wait():
                sys.exit(f"{log.read_text()}\n{' '.join(command)} failed")
    finally:
        for process in processes:
            process.kill()


def row(case: Case, measured: dict[str, Any]) -> str:
    differ = _difference(**measured["losses"])
    if differ > LOSSES_DIFFER:
        sys.exit(f"{case.name} and {case.by_hand}: losses differ by {differ:.1e}, so this is not the same work")
    ours, theirs = (np.median(measured["times"][side][1:], axis=1) for side in ("raytx", "by_hand"))
    (wall, cpu), (our_ms, _), (their_ms, _) = (ours / theirs).T, *(1000 * np.median(t, axis=0) for t in (ours, theirs))
    return (
        f"| {case.name} | {our_ms:.0f} | {case.by_hand} | {their_ms:.0f} "
        f"| {_spread(wall)} | {_spread(cpu)} | {differ:.0e} |"
    )


def _spread(ratios: np.ndarray) -> str:
    """Return the median, and where 90 % of the medians of resampled ratios lie."""
    drawn = np.random.default_rng(0).choice(ratios, size=(10_000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.05, 0.95])
    return f"{np.median(ratios):.3f} | {low:.3f} to {high:.3f}"


def _difference(raytx: list[float], by_hand: list[float]) -> float:
    ours, theirs = np.array(raytx), np.array(by_hand)
    return float(np.max(np.abs(ours - theirs) / theirs))


if __name__ == "__main__":
    main()
