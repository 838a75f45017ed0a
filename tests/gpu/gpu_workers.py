"""Do a job for a plan in a group of Ray Train workers of its own, each with its GPU."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.train import RunConfig, ScalingConfig

from raytx import keeper, ray_internals, rendezvous
from raytx.batches import Batches
from raytx.files import read_json
from raytx.launch import SharedGPUs
from raytx.plan import Plan
from raytx.prepare import META, Prepared

Job = Callable[[Plan, int], Any]
"""What a worker does for a plan, given its rank; what it returns must be JSON."""


def run(job: Job, plan: Plan, directory: Path) -> list[Any]:
    """Return what the job returned on every rank, in rank order."""
    gpu = plan.recipe.scaling.use_gpu
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= plan.recipe.strategy.environment(use_gpu=gpu)
    meeting_point = rendezvous.in_file(directory, "meet")
    ray_internals.trainer(
        _loop,
        train_loop_config={"job": job, "plan": plan.to_dict(), "into": str(directory), "meeting_point": meeting_point},
        backend_config=SharedGPUs(),
        scaling_config=ScalingConfig(
            num_workers=plan.world_size, use_gpu=gpu, resources_per_worker=plan.resources_per_worker
        ),
        run_config=RunConfig(
            name="job", storage_path=str(directory / "ray"), worker_runtime_env={"env_vars": environment}
        ),
    ).fit()
    return [read_json(directory / f"{rank}.json") for rank in range(plan.world_size)]


def _loop(config: dict[str, Any]) -> None:
    plan = Plan.from_dict(config["plan"])
    gpu = plan.recipe.scaling.use_gpu
    os.environ |= keeper.environment(use_gpu=gpu, local=True)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "nccl" if gpu else "gloo"
    rendezvous.meet(
        config["meeting_point"],
        backend=backend,
        rank=rank,
        world_size=world_size,
        timeout_s=600,
        device=os.environ.get("RAYTX_DEVICE"),
    )
    found = config["job"](plan, rank)
    (Path(config["into"]) / f"{rank}.json").write_text(json.dumps(found))


# ---------------------------------------------------------------------------------------------------------- jobs


def curve(plan: Plan, rank: int) -> list[dict[str, Any]]:
    """Train to the last step; return what rank 0 logged."""
    from raytx import worker

    log: list[dict[str, Any]] = []
    session = worker.Session(rank=rank, log=log.append, flush=lambda: None, report=lambda metrics: None)
    worker.train(plan, session)
    return log


def peak(plan: Plan, rank: int) -> int:
    """Do every step of a plan without measuring or saving; return this rank's peak bytes."""
    assert plan.prepared is not None
    assert plan.steps is not None
    train = plan.recipe.train
    directory = Path(plan.prepared)
    prepared = Prepared(directory=directory, **read_json(directory / META))
    model = plan.recipe.model.build()
    module = model.structure(prepared.processor, activation_checkpointing=train.activation_checkpointing)
    weights = model.weights(prepared.processor, seed=train.seed)
    engine = plan.recipe.strategy.build().engine(module, model=model, weights=weights, plan=plan, rank=rank)
    task = model.task(prepared.processor)
    batches = Batches(plan, task, prepared.samples("train"), dp_rank=plan.layout.dp_rank(rank))
    for step in range(plan.steps):
        engine.train_batch(batches.microbatches(step), lr=plan.lr(step))
    return int(engine.peak_memory())
