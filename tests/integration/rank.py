"""One rank of a process group without Ray: trains plans one after the other and keeps what they log.

python rank.py RANK WORLD_SIZE RENDEZVOUS_FILE PLAN.json...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(rank: int, world_size: int, rendezvous: str, plans: list[str]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    import torch.distributed as dist

    from raytx import worker
    from raytx.plan import Plan

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    for path in plans:
        plan = Plan.from_dict(json.loads(Path(path).read_text()))
        log = Path(path).with_suffix(".jsonl").open("a")
        session = worker.Session(
            rank=rank,
            log=lambda record, to=log: print(json.dumps(record), file=to, flush=True),
            flush=lambda: None,
            report=lambda metrics: None,
        )
        worker.train(plan, session)
    dist.barrier()
    os._exit(0)  # DeepSpeed's threads would keep the process for seconds


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
