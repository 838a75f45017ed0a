"""One rank of a process group: does jobs one after the other; rank 0 writes what they found.

python rank.py RANK WORLD_SIZE RENDEZVOUS_FILE JOBS.json
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any


def main(rank: int, world_size: int, rendezvous: str, jobs: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    from raytx.rendezvous import meet

    meeting = meet(f"file://{rendezvous}", backend="gloo", rank=rank, world_size=world_size, timeout_s=600)
    found = {name: globals()[job.pop("do")](rank, **job) for name, job in json.loads(Path(jobs).read_text()).items()}
    if rank == 0:
        Path(jobs).with_suffix(".found").write_text(json.dumps(found))
    meeting.part()
    os._exit(0)  # DeepSpeed's threads would keep the process for seconds


def parity(rank: int, **case: Any) -> dict[str, float]:
    """Train to the end; return how far loss, norm and weights get from plain torch's, and how often it clipped."""
    import numpy as np
    import work

    job = work.Case(**case)
    expected, weights, logits = work.reference(job)
    engine = work.engine(job, rank)
    steps, tensors = work.train(engine, job, rank), work.whole(engine)
    _, answers = engine.eval_batch(work.unseen(job), logits=True)
    assert {name for name, part in tensors if part == "weight"} == weights.keys()
    return {
        **_distances(steps, expected),
        "weights": max(float(np.abs(tensors[name, "weight"] - value).max()) for name, value in weights.items()),
        "logits": float(np.abs(answers - logits).max()),
        "clipped": sum(row["grad_norm"] > work.LIMIT for row in expected),
        "handed": engine.gather(sum(array.nbytes for _, _, array in engine.tensors() if array is not None)),
    }


def resume(rank: int, *, first: dict[str, Any], then: dict[str, Any], middle: int = 5) -> dict[str, float]:
    """Train some steps, move every tensor into a fresh engine of another kind, and train there to the end."""
    import numpy as np
    import work

    one, other = work.Case(**first), work.Case(**then)
    engine = work.engine(one, rank)
    work.train(engine, one, rank, last=middle)
    saved = work.whole(engine)
    engine = work.engine(other, rank)
    engine.load_tensors(lambda name, part: saved[name, part], step=middle)
    engine.load_scalars(engine.scalars())
    loaded = work.whole(engine)
    steps = work.train(engine, other, rank, first=middle)
    return {
        **_distances(steps, work.reference(other)[0][middle:]),
        "same": saved.keys() == loaded.keys() and all(np.array_equal(saved[key], loaded[key]) for key in saved),
    }


def held(rank: int, **case: Any) -> dict[str, float]:
    """Return the largest share of the model's elements that was in this rank's memory while it was filled."""
    import torch.distributed as dist
    import work

    job = work.Case(**case)
    module = work.structure(job.family)
    total, most = sum(p.numel() for p in module.parameters()), 0

    def weights(name: str) -> Any:
        nonlocal most
        value = work.reader(job.family)(name)
        most = max(most, _elements(module) + value.size)
        return value

    work.engine(job, rank, module=module, weights=weights)
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, (most / total, _elements(module) / total))
    return {"filling": max(share for share, _ in shares), "filled": max(share for _, share in shares)}


def overflow(rank: int, *, stage: int) -> dict[str, Any]:
    """Take a step in fp16 with a scale that no gradient bears, and resume. DeepSpeed has to be told that a CPU can."""
    import work
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    job = work.Case(strategy={"stage": stage}, ranks=2, precision="fp16")
    engine = work.engine(job, rank)
    before = work.whole(engine)
    engine.load_scalars({"loss_scale": 2.0**40, "clean_steps": 7.0, "skipped_steps": 0.0})
    rows = work.train(engine, job, rank, last=1)
    after = work.whole(engine)
    scalars = engine.scalars()
    fresh = work.engine(job, rank)
    fresh.load_tensors(lambda name, part: after[name, part], step=3)
    fresh.load_scalars({**scalars, "loss_scale": 2.0**12})
    rows += work.train(fresh, job, rank, last=1)
    return {"rows": rows, "scalars": scalars, "changed": any((before[key] != after[key]).any() for key in before)}


def left_out(rank: int, *, stage: int) -> dict[str, Any]:
    """Take steps in fp16 that are left out though the scale is not to blame; return rows, scale and if it changed."""
    import work
    from deepspeed.accelerator import get_accelerator

    from raytx_deepspeed import loss_scale

    get_accelerator().is_fp16_supported = lambda: True
    job = work.Case(strategy={"stage": stage}, ranks=2, precision="fp16")
    loss_scale.LEAST = 2.0**40  # no gradient bears it, as if it were the least one
    engine = work.engine(job, rank)
    before, scalars = work.whole(engine), {"loss_scale": 2.0**40, "clean_steps": 7.0, "skipped_steps": 1.0}
    engine.load_scalars(scalars)
    rows = work.train(engine, job, rank, last=1)
    loss_scale.LEAST = 2.0**-14
    engine.load_scalars(scalars | {"loss_scale": 2.0**12})
    each = job.plan().gradient_accumulation_steps
    poisoned = [replace(one, weight=math.nan) for one in work.batch(0, packed=False)[rank * each : (rank + 1) * each]]
    rows.append(engine.train_batch(poisoned, lr=1e-3))
    after = work.whole(engine)
    return {
        "rows": [{key: str(value) for key, value in row.items()} for row in rows],
        "scalars": engine.scalars(),
        "changed": any((before[key] != after[key]).any() for key in before),
    }


def gradients(rank: int, *, family: str) -> dict[str, float]:
    """Run a cut module forward and backward without any engine; return how far it gets from the uncut one."""
    import torch.distributed as dist
    import work

    return work.cut_against_whole(family, rank=rank, size=dist.get_world_size())


def _elements(module: Any) -> int:
    """Count the elements that parameters have in memory: what ZeRO keeps apart, and what is whole."""
    placed = [parameter for parameter in module.parameters() if not parameter.is_meta]
    return sum(p.numel() + (p.ds_tensor.numel() if hasattr(p, "ds_tensor") else 0) for p in placed)


def _distances(rows: list[dict[str, float]], expected: list[dict[str, float]]) -> dict[str, float]:
    pairs = list(zip(rows, expected, strict=True))
    return {key: max(abs(a[key] - b[key]) / abs(b[key]) for a, b in pairs) for key in ("loss", "grad_norm")}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
