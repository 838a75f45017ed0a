"""One rank on which raytx and a loop written by hand take turns, a few steps each, in the same process group.

    python contest.py RANK WORLD_SIZE RENDEZVOUS_FILE JOB.json RESULT.json

raytx's side is `worker.train` as it is: it evaluates after every few steps, and an evaluation's report, which every
rank makes, is when the other side takes its turn. So whatever else the machine does, it does to both.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any


class Done(Exception):  # noqa: N818  nothing went wrong
    """Both sides have had all their turns."""


class Contest:
    """Keeps the time of both sides, as rank 0 sees it. A step's time runs from the end of the step before."""

    def __init__(self, other: Any, *, steps: int, blocks: int) -> None:
        self._other, self._steps, self._blocks = other, steps, blocks
        self._last = _clocks()
        self.times: dict[str, list[list[tuple[float, ...]]]] = {"raytx": [[]], "by_hand": []}
        """Seconds of each step in blocks: by the clock on the wall, and of this process's CPU time."""
        self.losses: dict[str, list[float]] = {"raytx": [], "by_hand": []}

    def log(self, record: dict[str, Any]) -> None:
        """Take what raytx logs of its steps."""
        if record["kind"] == "step":
            self.times["raytx"][-1].append(self._lap())
            self.losses["raytx"].append(record["loss"])

    def turn(self, metrics: dict[str, float]) -> None:
        """Let the other side do its steps, then hand over to raytx again."""
        block = []
        self._last = _clocks()
        for _ in range(self._steps):
            self.losses["by_hand"].append(next(self._other))
            block.append(self._lap())
        self.times["by_hand"].append(block)
        if len(self.times["by_hand"]) == self._blocks:
            raise Done
        self.times["raytx"].append([])
        self._last = _clocks()

    def _lap(self) -> tuple[float, ...]:
        last, self._last = self._last, _clocks()
        return tuple(now - before for now, before in zip(self._last, last, strict=True))


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def main(rank: int, world_size: int, rendezvous: str, job: dict[str, Any], result: Path) -> None:
    _tell_the_launchers_variables(rank, world_size)
    from by_hand import LOOPS

    from raytx import worker
    from raytx.plan import Plan
    from raytx.rendezvous import meet

    meeting = meet(f"file://{rendezvous}", backend="gloo", rank=rank, world_size=world_size, timeout_s=600)
    plan = Plan.from_dict(job["plan"])
    contest = Contest(LOOPS[job["by_hand"]](work(plan, rank)), steps=job["steps"], blocks=job["blocks"])
    session = worker.Session(rank=rank, log=contest.log, flush=lambda: None, report=contest.turn)
    try:
        worker.train(plan, session)
    except Done:
        if rank == 0:
            result.write_text(json.dumps({"times": contest.times, "losses": contest.losses}))
    meeting.part()
    os._exit(0)  # DeepSpeed's threads, and Trainer's, would keep the process


def work(plan: Any, rank: int) -> Any:
    """Return what the plan's steps come to as plain arrays, for whoever writes the loop by hand."""
    import numpy as np
    from by_hand import Work

    from raytx.batches import Batches
    from raytx.files import read_json
    from raytx.prepare import META, Prepared

    prepared = Prepared(directory=Path(plan.prepared), **read_json(Path(plan.prepared) / META))
    samples, model, train = prepared.samples("train"), plan.recipe.model.build(), plan.recipe.train
    task = model.task(prepared.processor)
    batches = Batches(plan, task, samples, dp_rank=0)
    return Work(
        module=lambda: model.module(prepared.processor, seed=train.seed).train(),
        features={name: np.asarray(array) for name, array in task.collate(samples[range(len(samples))]).items()},
        targets=samples.num_targets,
        order=np.stack([batches.indices(step) for step in range(plan.steps)]),
        micro=train.micro_batch_size,
        rank=plan.layout.dp_rank(rank),
        ranks=plan.layout.data_parallel_size,
    )


def _tell_the_launchers_variables(rank: int, world_size: int) -> None:
    """Set what torchrun sets, before torch is imported, and keep the ranks' sockets on this machine."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(Path(sys.argv[4]).read_text()), Path(sys.argv[5]))
