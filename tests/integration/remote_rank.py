"""A rank as rank.py has it, on a node of its own: with its own cache, and with a store that fails when told to.

python remote_rank.py CACHE FAULT RANK WORLD_SIZE RENDEZVOUS_FILE PLAN.json...

FAULT is "", or "die:<pattern>", which kills the process in the midst of putting the first file of such a name into the
store, or "fail:<pattern>", which makes putting it fail, but not when it is tried again.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import rank


def main(cache: str, fault: str, *arguments: Any) -> None:
    os.environ["RAYTX_CACHE"] = cache
    if fault:
        _break(*fault.split(":"))
    number, world_size, rendezvous, *plans = arguments
    rank.main(int(number), int(world_size), rendezvous, plans)


def _break(kind: str, wanted: str) -> None:
    from raytx.storage import Store

    put: Any = Store.put
    met: list[str] = []

    def faulty(store: Any, path: Path, name: str, **more: Any) -> None:
        if not re.search(wanted, name) or met:
            return put(store, path, name, **more)
        met.append(name)
        if kind == "fail":
            raise OSError("the server is not in the mood")
        with store._writing(name) as sink:
            sink.write(path.read_bytes()[:-64])
            os.kill(os.getpid(), signal.SIGKILL)

    Store.put = faulty  # type: ignore[method-assign]


if __name__ == "__main__":
    main(*sys.argv[1:])
