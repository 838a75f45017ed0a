"""Who works in a run's directory and how each of them ended: what is in .lock and in status.json."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from raytx.errors import StoppedError
from raytx.files import read_json, write_json

LOCK = ".lock"
STATUS = "status.json"
INTERRUPTED = "interrupted"
TURNS_KEPT = 200
REMARKS_KEPT = 50
"""A turn's remarks that stay; a run that is restarted for days must not make its own record slow to write."""
ERROR_CHARACTERS = 4000

Turn = dict[str, Any]
"""One command at work on a run: host, pid, doing, started, and once it has ended also ended, error and remarks."""


def holder(run_dir: Path) -> Turn | None:
    """Return what the process that holds a run says of itself, or None when nobody holds it.

    Asks for a shared lock and lets go of it at once; who wants the run for himself tries for longer than that takes.
    """
    try:
        with open(run_dir / LOCK, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _said(file)
    except OSError:  # no lock was ever taken, it is not ours to read, or this file system knows no locks
        pass
    return None


def claim(file: IO[str], doing: str) -> None:
    """Write into a lock that this process has just taken who it is; a full disk must not keep it from working."""
    with contextlib.suppress(OSError):
        file.seek(0)
        file.truncate()
        file.write(json.dumps(this(doing)))
        file.flush()


def turns(run_dir: Path) -> list[Turn]:
    """Return the turns of a run in their order; none where nothing was recorded or what was is unreadable."""
    try:
        found = read_json(run_dir / STATUS)["turns"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [turn for turn in found if isinstance(turn, dict)] if isinstance(found, list) else []


@contextlib.contextmanager
def recorded(run_dir: Path, doing: str) -> Iterator[None]:
    """Record this process's turn: its beginning at once, and how it ends; a kill leaves a turn without an end."""
    _write(run_dir, [*turns(run_dir), this(doing)])
    try:
        yield
    except (KeyboardInterrupt, StoppedError):
        _change(run_dir, ended=round(time.time(), 3), error=INTERRUPTED)
        raise
    except BaseException as error:
        told = str(error) if type(error).__module__.startswith("raytx") else f"{type(error).__name__}: {error}"
        _change(run_dir, ended=round(time.time(), 3), error=told[:ERROR_CHARACTERS])
        raise
    _change(run_dir, ended=round(time.time(), 3), error=None)


def remark(run_dir: Path, text: str) -> None:
    """Add what the user is told, such as why workers were restarted, to the turn of this process."""
    if found := turns(run_dir):
        entry = {"time": round(time.time(), 3), "text": text}
        _change(run_dir, remarks=[*found[-1].get("remarks", []), entry][-REMARKS_KEPT:])


def here(turn: Turn) -> bool:
    """Tell whether a turn was on this machine."""
    return bool(turn.get("host") == socket.gethostname())


def _said(file: IO[str]) -> Turn:
    try:
        said = json.loads(file.read())
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def this(doing: str) -> Turn:
    """Return what this process says of itself when it begins to do something."""
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])
    started = round(time.time(), 3)
    return {"host": socket.gethostname(), "pid": os.getpid(), "doing": doing, "command": command, "started": started}


def _change(run_dir: Path, **values: Any) -> None:
    if found := turns(run_dir):
        _write(run_dir, [*found[:-1], found[-1] | values])


def _write(run_dir: Path, found: list[Turn]) -> None:
    """A record that cannot be written says nothing that the run's own error would not say better."""
    with contextlib.suppress(OSError):
        write_json(run_dir / STATUS, {"turns": found[-TURNS_KEPT:]})
