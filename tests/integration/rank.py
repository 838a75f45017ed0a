"""One rank of a process group without Ray: trains plans one after the other and keeps what they log.

python rank.py RANK WORLD_SIZE RENDEZVOUS_FILE PLAN.json...

RAYTX_OMITTED names for each plan a step that is not done at all, as if its samples had never been there, or 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any


def main(rank: int, world_size: int, rendezvous: str, plans: list[str]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    import raytx_unsteady

    from raytx import worker
    from raytx.plan import Plan
    from raytx.rendezvous import meet
    from raytx.testing import FakeEntryPoint, installed

    meeting = meet(f"file://{rendezvous}", backend="gloo", rank=rank, world_size=world_size, timeout_s=600)
    with installed(FakeEntryPoint("raytx_unsteady", raytx_unsteady)):
        for path, omitted in zip(plans, json.loads(os.environ["RAYTX_OMITTED"]), strict=True):
            plan = Plan.from_dict(json.loads(Path(path).read_text()))
            log = Path(path).with_suffix(".jsonl").open("a")
            session = worker.Session(
                rank=rank,
                log=lambda record, to=log: print(json.dumps(record), file=to, flush=True),
                flush=lambda: None,
                report=lambda metrics: None,
            )
            with omitting(omitted):
                worker.train(plan, session)
    meeting.part()
    os._exit(0)  # DeepSpeed's threads would keep the process for seconds


@contextlib.contextmanager
def omitting(omitted: int) -> Iterator[None]:
    """Let the loop pass over a step."""
    from raytx.worker import _Loop

    step: Any = _Loop.step

    def passing(loop: Any, state: Any) -> Any:
        return replace(state, step=omitted) if state.step + 1 == omitted else step(loop, state)

    _Loop.step = passing  # type: ignore[method-assign]
    yield
    _Loop.step = step  # type: ignore[method-assign]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
