"""Train plans one after the other in one group of Ray Train workers: what a run of many small layouts would cost in
starting processes is paid once."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.train import RunConfig, ScalingConfig

from raytx import keeper, ray_internals, rendezvous
from raytx.plan import Plan


def train_all(plans: Sequence[Plan], directory: Path) -> list[list[dict[str, Any]]]:
    """Return what each plan logged, in order. All plans are of one world size."""
    (world_size,) = {plan.world_size for plan in plans}
    paths = [directory / f"{place:03}.json" for place in range(len(plans))]
    for path, plan in zip(paths, plans, strict=True):
        path.write_text(json.dumps(plan.to_dict()))
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for plan in plans:
        environment |= plan.recipe.strategy.environment(use_gpu=False)
    meeting_point = rendezvous.in_file(directory, "meet")
    ray_internals.trainer(
        _loop,
        train_loop_config={"paths": [str(path) for path in paths], "meeting_point": meeting_point},
        scaling_config=ScalingConfig(num_workers=world_size, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name="plans", storage_path=str(directory / "ray"), worker_runtime_env={"env_vars": environment}
        ),
    ).fit()
    return [[json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()] for path in paths]


def _loop(config: dict[str, Any]) -> None:
    from raytx import worker

    os.environ |= keeper.environment(use_gpu=False, local=True)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rendezvous.meet(config["meeting_point"], backend="gloo", rank=rank, world_size=world_size, timeout_s=600)
    for path in map(Path, config["paths"]):
        plan = Plan.from_dict(json.loads(path.read_text()))
        log = path.with_suffix(".jsonl").open("a") if rank == 0 else None
        started = time.monotonic()

        def write(record: dict[str, Any], to: Any = log) -> None:
            print(json.dumps(record), file=to, flush=True)

        session = worker.Session(rank=rank, log=write, flush=lambda: None, report=lambda metrics: None)
        try:
            worker.train(plan, session)
        except Exception:  # what every rank stumbles over must not take the other plans with it
            write({"kind": "failed", "traceback": traceback.format_exc()}) if rank == 0 else None
            continue
        if rank == 0:
            write({"kind": "done", "seconds": time.monotonic() - started})
