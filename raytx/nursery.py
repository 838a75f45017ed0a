"""The actor on each node that owns the fork server, so that it outlives the workers that ask it for ranks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import ray

from raytx.cluster import private_directory
from raytx.plan import Plan
from raytx.prepare import bring

BACKLOG = 128
OWNED = re.compile(r"(fork|rank)-(?P<pid>\d+)(-|$)")
"""Names of files that are of no use without the process whose id is in them."""


@ray.remote(num_cpus=0)
class Nursery:
    """Starts a fork server for one plan, and another when that has died or does nothing any more."""

    def __init__(self, plan: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self._plan, self._environment = plan, environment
        self._server: subprocess.Popen[bytes] | None = None
        self._path = private_directory() / f"fork-{os.getpid()}"
        _clear(private_directory())
        with contextlib.suppress(Exception):  # ranks try again, and tell
            bring(Plan.from_dict(plan))  # here: file systems start threads, and the server must have none
        self._start()

    def address(self) -> str:
        """Return the path of the socket at which a rank can be asked for."""
        assert self._server is not None
        if self._server.poll() is None and psutil.Process(self._server.pid).status() == psutil.STATUS_STOPPED:
            self._server.kill()  # every rank that is asked of it would be waited for until that is called a stall
            self._server.wait()
        if self._server.poll() is not None:
            self._start()
        return str(self._path)

    def _start(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self._path))
            self._path.chmod(0o600)
            listener.listen(BACKLOG)
            self._server = _run(listener, self._environment)
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(self._plan).encode() + b"\n")
        self._server.stdin.flush()


def _clear(directory: Path) -> None:
    """Remove what killed processes have left: sockets of fork servers, and directories of ranks (see keeper.py)."""
    for path in directory.iterdir():
        owner = OWNED.match(path.name)
        if owner and not psutil.pid_exists(int(owner["pid"])):
            with contextlib.suppress(OSError):  # another nursery of the node clears, too
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _run(listener: socket.socket, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the server on a listening socket; it lives as long as its stdin is open."""
    return subprocess.Popen(
        [sys.executable, "-m", "raytx.forkserver", str(listener.fileno())],
        stdin=subprocess.PIPE,
        env=os.environ | dict(environment),
        pass_fds=(listener.fileno(),),
        start_new_session=True,  # Ctrl-C is the driver's
    )
