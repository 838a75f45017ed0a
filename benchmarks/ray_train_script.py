"""What a user of plain Ray Train writes for two workers that may die: DDP, a checkpoint every few steps, restarts.

python ray_train_script.py DIRECTORY MICRO_BATCH_SIZE SAVE_EVERY

recovery.py kills its workers. It notes in DIRECTORY/metrics.jsonl which processes its ranks are and when a step is
done, as raytx does.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from by_hand import MAX_NORM, Work, adamw
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import nn
from trainer_script import model

from raytx import cluster


def main(directory: Path, micro: int, every: int) -> None:
    cluster.connect()  # the Ray that raytx starts, on loopback
    TorchTrainer(
        train,
        train_loop_config={"directory": str(directory), "micro": micro, "every": every},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="plain",
            storage_path=str(directory / "ray"),
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}},
        ),
    ).fit()


def train(config: dict[str, Any]) -> None:
    """Train one rank, from the last checkpoint where there is one, until somebody ends it."""
    directory, every = Path(config["directory"]), config["every"]
    work = _work(directory, config["micro"])
    module = ray.train.torch.prepare_model(work.module())
    optimizer = adamw(module)
    step = _restore(module, optimizer)
    pids: list[int] = [0] * work.ranks
    dist.all_gather_object(pids, os.getpid())
    _note(directory, kind="resumed" if step else "started", step=step)
    _note(directory, kind="placed", step=step, pids=pids)
    while True:
        loss = _step(module, optimizer, work, step % len(work.order))
        step += 1
        _note(directory, kind="step", step=step, loss=loss)
        if step % every == 0:
            _save(module, optimizer, step)


def _work(directory: Path, micro: int) -> Work:
    arrays = dict(np.load(directory / "samples.npz"))
    targets, order = arrays.pop("num_targets"), arrays.pop("order")
    context = ray.train.get_context()
    torch.manual_seed(0)
    rank, ranks = context.get_world_rank(), context.get_world_size()
    return Work(lambda: model(directory), arrays, targets, order, micro, rank, ranks)


def _step(module: nn.Module, optimizer: torch.optim.Optimizer, work: Work, step: int) -> float:
    total = torch.zeros(())
    for features, weight in work.microbatches(step):
        share = module(**features).loss * weight
        (share * work.ranks).backward()
        total += share.detach()
    nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(total)
    return total.item()


def _save(module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report({"step": step})
        return
    with tempfile.TemporaryDirectory() as directory:
        state = {"model": module.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, Path(directory) / "state.pt")
        ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(directory))


def _restore(module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the last checkpoint that was reported; return its step."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as directory:
        state = torch.load(Path(directory) / "state.pt", weights_only=True)
    module.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _note(directory: Path, **record: Any) -> None:
    if ray.train.get_context().get_world_rank() == 0:
        with open(directory / "metrics.jsonl", "a") as file:
            file.write(json.dumps({**record, "time": time.time()}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
