"""The actor on each node that owns the fork server, so that it outlives the workers that ask it for ranks."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import ray

from raytx.cluster import private_directory
from raytx.plan import Plan
from raytx.prepare import bring

BACKLOG = 128


@ray.remote(num_cpus=0)
class Nursery:
    """Starts a fork server for one plan, and another when that has died."""

    def __init__(self, plan: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self._plan, self._environment = plan, environment
        self._server: subprocess.Popen[bytes] | None = None
        self._path = private_directory() / f"fork-{os.getpid()}"
        with contextlib.suppress(Exception):  # ranks try again, and tell
            bring(Plan.from_dict(plan))  # here: file systems start threads, and the server must have none
        self._start()

    def address(self) -> str:
        """Return the path of the socket at which a rank can be asked for."""
        if self._server is None or self._server.poll() is not None:
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


def _run(listener: socket.socket, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the server on a listening socket; it lives as long as its stdin is open."""
    return subprocess.Popen(
        [sys.executable, "-m", "raytx.forkserver", str(listener.fileno())],
        stdin=subprocess.PIPE,
        env=os.environ | dict(environment),
        pass_fds=(listener.fileno(),),
        start_new_session=True,  # Ctrl-C is the driver's
    )
