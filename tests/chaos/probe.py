"""A plugin for runs under test: each rank tells what it is doing, and which steps it did when.

It is put on the path of `raytx train` by job.py and changes nothing of what a run does. A rank keeps two files in the
probe directory of its run: `rank-N.now`, one line that is overwritten (pid, phase, steps done, time), and
`rank-N.jsonl`, one line for each step that it did.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raytx import hookimpl, worker

RAYTX_API = 1
WIDTH = 96
"""Bytes of the line that is overwritten, so that a reader never sees parts of two."""


@hookimpl
def raytx_export() -> list[Any]:
    return []


class Teller:
    """What this process tells of its rank."""

    def __init__(self) -> None:
        self.step = 0
        self._now = self._log = -1

    def open(self, directory: Path, rank: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._now = os.open(directory / f"rank-{rank}.now", os.O_CREAT | os.O_WRONLY)
        self._log = os.open(directory / f"rank-{rank}.jsonl", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def say(self, phase: str) -> None:
        if self._now >= 0:
            line = f"{os.getpid()} {phase} {self.step} {time.time():.6f}"
            os.pwrite(self._now, line.ljust(WIDTH).encode(), 0)

    def did(self, step: int) -> None:
        self.step = step
        line = {"step": step, "time": time.time(), "pid": os.getpid()}
        os.write(self._log, (json.dumps(line) + "\n").encode())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.say(name)
        yield
        self.say("between")


teller = Teller()


def around(owner: Any, name: str, wrap: Callable[..., Any]) -> None:
    """Replace a function by one that is called with it; a name that is gone must not pass unnoticed."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(functools.partial(wrap, original)))


def method_around(owner: type, name: str, wrap: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(lambda *args, **options: wrap(original, *args, **options)))


def _train(original: Callable[..., Any], plan: Any, session: Any) -> Any:
    teller.open(plan.run_dir.parent.parent / "probe" / plan.recipe.name, session.rank)
    teller.say("start")
    return original(plan, session)


def _restore(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with teller.phase("restore"):
        state = original(*args, **options)
    teller.step = state.step
    return state


def _step(original: Callable[..., Any], loop: Any, state: Any) -> Any:
    with teller.phase("step"):
        state = original(loop, state)
        teller.did(state.step)
    return state


def _in(phase: str) -> Callable[..., Any]:
    def wrapped(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with teller.phase(phase):
            return original(*args, **options)

    return wrapped


around(worker, "train", _train)
around(worker, "restore", _restore)
method_around(worker._Loop, "step", _step)
method_around(worker._Loop, "evaluate", _in("evaluation"))
method_around(worker._Loop, "save", _in("save"))
