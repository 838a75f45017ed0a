"""A process that has imported what training needs, and forks ranks from itself: a new one is there in a moment.

Importing torch, transformers and a plan's plugins takes many seconds; after a failure every rank would do it again. The
server does it once on each node and outlives the ranks. It is single-threaded and starts no CUDA, so that forking it is
safe; where a library made it otherwise, the rank is a fresh process instead.

Run as `python -m raytx.forkserver <descriptor of a listening socket>`, with the plan to warm up for on stdin, which
stays open: when it closes, the owner is gone, and so are the server and its ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raytx import rank
from raytx.channel import Channel

FORK_AWARE = frozenset({"jemalloc_bg_thd"})
"""Threads that come with handlers for a fork: those of jemalloc, which pyarrow brings along."""
JOB_S = 1.0
"""How long whoever has begun to say what job it is may take to go on."""
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Warm up, then serve until the owner is gone."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    listener.set_inheritable(False)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks ranks for their stacks; some are not ready for it yet
    warm_up(json.loads(sys.stdin.readline()))
    with _children_wake() as woken:
        Server(listener, woken).run()


def warm_up(plan: dict[str, Any]) -> None:
    """Import what the ranks of a plan will; what fails here fails in them again, where it is told."""
    from raytx.plan import Plan
    from raytx.worker import structure

    with contextlib.suppress(Exception):
        structure(Plan.from_dict(plan))
        Plan.from_dict(plan).recipe.strategy.build()


class Server:
    """Forks a rank for every connection; tells how it ended; ends it when the connection is closed."""

    def __init__(self, listener: socket.socket, woken: socket.socket) -> None:
        self._listener = listener
        self._ranks: dict[int, Channel] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(woken, selectors.EVENT_READ, lambda: woken.recv(4096))
        self._selector.register(sys.stdin, selectors.EVENT_READ, self._leave)

    def run(self) -> None:
        while True:
            for key, _ in self._selector.select(timeout=1.0):
                key.data()
            self._end_abandoned()
            self._reap()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        channel = Channel(connection)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._hear(channel))

    def _hear(self, channel: Channel) -> None:
        """Start the rank that is asked for; whoever asks may be gone again, or stopped within a word."""
        self._selector.unregister(channel)
        try:
            job = channel.receive(timeout_s=JOB_S)
        except (EOFError, OSError):
            channel.close()
            return
        self._ranks[self._start(channel, job)] = channel

    def _start(self, channel: Channel, job: dict[str, Any]) -> int:
        """Start a rank that talks through the channel; return its process id."""
        fresh = not forkable()
        pid = os.fork()
        if pid:
            with contextlib.suppress(OSError):
                channel.send({"started": pid})
            return pid
        try:
            os.setsid()  # what a rank starts ends with it
            _die_with_parent()
            _default_signals()
            for other in self._ranks.values():
                other.close()
            self._selector.close()
            self._listener.close()
            if fresh:
                _execute(channel, job)
            rank.main(channel, job)
        finally:
            os._exit(1)  # nothing of the server may go on in a child

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if not pid:
                    return
                _end(pid)
                self._tell_end(pid, os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024)

    def _tell_end(self, pid: int, code: int, peak_bytes: int) -> None:
        channel = self._ranks.pop(pid, None)
        if channel is not None:
            with contextlib.suppress(OSError):
                channel.send({"exit": code, "peak_bytes": peak_bytes}, after_others=True)
            channel.close()

    def _end_abandoned(self) -> None:
        """End ranks whose keepers are gone: a rank that is stopped or stuck cannot see that itself."""
        for pid, channel in self._ranks.items():
            if channel.abandoned():
                _end(pid)

    def _leave(self) -> None:
        if os.read(sys.stdin.fileno(), 1):
            return
        for pid in self._ranks:
            _end(pid)
        with contextlib.suppress(OSError):
            os.unlink(self._listener.getsockname())
        os._exit(0)


def _end(pid: int) -> None:
    """End a rank and what it started; what is left of its group, where it has ended itself."""
    for end in (os.killpg, os.kill):  # in its first moment it has no group yet
        with contextlib.suppress(ProcessLookupError):
            end(pid, signal.SIGKILL)


def forkable() -> bool:
    """Tell whether this process may be forked: no other thread holds a lock, and CUDA was not started."""
    return threads() == 1 and not _has_started_cuda()


def _has_started_cuda() -> bool:
    """Look for the device that CUDA opens; torch knows only of what it started itself."""
    for entry in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):
            if "nvidia-uvm" in os.readlink(entry):
                return True
    return False


def threads() -> int:
    """Return the threads of this process that a fork could catch holding a lock, libraries' own among them."""
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        return threading.active_count()
    return sum((task / "comm").read_text().strip() not in FORK_AWARE for task in tasks.iterdir())


def _execute(channel: Channel, job: dict[str, Any]) -> None:
    """Become a fresh process that runs the rank."""
    with tempfile.TemporaryFile() as file:
        file.write(json.dumps(job).encode())
        file.seek(0)
        for descriptor in (file.fileno(), channel.fileno()):
            os.set_inheritable(descriptor, True)
        os.execv(sys.executable, [sys.executable, "-m", "raytx.rank", str(channel.fileno()), str(file.fileno())])


def _die_with_parent() -> None:
    """Have the kernel kill this process when the server is killed; Linux only, elsewhere ranks look for themselves."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _default_signals() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextlib.contextmanager
def _children_wake() -> Iterator[socket.socket]:
    """Yield a socket that can be read from whenever a child has ended."""
    woken, waker = socket.socketpair()
    waker.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    try:
        yield woken
    finally:
        signal.set_wakeup_fd(-1)
        woken.close()
        waker.close()


if __name__ == "__main__":
    main()
