"""A process that dies at the n-th change it makes to a file system, and a power failure that may come with it.

    died, operations = dying(root, at=17, do=lambda: train())    # in a forked child; the parent goes on

Writing, creating, renaming and removing count, and so does waiting for the disk. A power failure does the worst it may:
files that nobody synchronised lose their second half, what happened to a directory that nobody synchronised has not
happened - but everything removed is gone.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DIED = 9
FAILED = 1
WALL_S = 120
"""A child that takes longer hangs, and is ended."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def dying(root: Path, *, at: int | None, do: Callable[[], Any], power_fails: bool = True) -> tuple[bool, int]:
    """Do something in a child that dies at an operation below `root`, alone or with the machine.

    Returns whether it died, and how many operations there were where it did not.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(WALL_S)
        torch.set_num_threads(1)  # a fork has no copy of its parent's pool of threads, and would wait for them
        disk = Disk(root, at, power_fails=power_fails)
        try:
            disk.watch()
            do()
            os.write(writing, str(disk.done).encode())
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(FAILED)
    os.close(writing)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(reading) as told:
        done = told.read()
    assert code in (0, DIED), f"the child failed with {code}{' after waiting too long' * (code == -signal.SIGALRM)}"
    return code == DIED, int(done or 0)


class Disk:
    """What happens to files below a root, and what of it would outlive a power failure."""

    def __init__(self, root: Path, at: int | None, *, power_fails: bool) -> None:
        self._root, self._at, self._power_fails = f"{root}/", at, power_fails
        self.done = 0
        self._dying = False
        self._written: set[str] = set()
        """Files whose bytes may be lost."""
        self._pending: list[tuple[str, str | None]] = []
        """(path, where it was before) of what is new in a directory that was not synchronised since, in order."""

    def watch(self) -> None:
        """See every operation of this process from now on."""
        sys.addaudithook(self._hear)
        sync, send, plain = os.fsync, os.sendfile, builtins.open
        os.fsync = lambda handle: self._sync(handle, sync)  # type: ignore[assignment]
        os.sendfile = lambda out, *rest: self._step(lambda: send(out, *rest))  # type: ignore[assignment]
        builtins.open = lambda *args, **options: self._opened(plain(*args, **options))  # type: ignore[assignment]

    # ---- operations

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self._dying or event not in HEARD:
            return
        HEARD[event](self, *args)

    def _open(self, path: Any, mode: Any, flags: int) -> None:
        if isinstance(path, str | os.PathLike) and flags & WRITING and self._mine(path):
            self._count()
            if not os.path.exists(path):
                self._pending.append((os.fspath(path), None))
            self._written.add(os.fspath(path))

    def _mkdir(self, path: Any, mode: Any, handle: Any) -> None:
        if self._mine(path) and not os.path.exists(path):
            self._count()
            self._pending.append((os.fspath(path), None))

    def _rename(self, source: Any, target: Any, *handles: Any) -> None:
        if self._mine(target):
            self._count()
            self._move(os.fspath(source), os.fspath(target))
            self._pending.append((os.fspath(target), os.fspath(source)))

    def _remove(self, path: Any, handle: int = -1) -> None:
        if handle != -1 or self._mine(path):
            self._count()

    def _opened(self, file: Any) -> Any:
        name = file.name if isinstance(getattr(file, "name", None), str | os.PathLike) else None
        return Slow(file, self) if name is not None and file.writable() and self._mine(name) else file

    def _sync(self, handle: int, sync: Callable[[int], None]) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if self._mine(path):
            self._count()
        sync(handle)
        self._written.discard(path)
        self._pending = [entry for entry in self._pending if os.path.dirname(entry[0]) != path]

    def _step(self, action: Callable[[], Any]) -> Any:
        self._count()
        return action()

    def _mine(self, path: Any) -> bool:
        return f"{os.fspath(path)}/".startswith(self._root)

    def _count(self) -> None:
        self.done += 1
        if self.done == self._at:
            self.die()

    def _move(self, source: str, target: str) -> None:
        """Let what is known of a path, and of what lies below it, go by its new name."""

        def moved(path: str) -> str:
            return target + path[len(source) :] if path == source or path.startswith(f"{source}/") else path

        self._written = {moved(path) for path in self._written}
        self._pending = [(moved(path), before) for path, before in self._pending]

    # ---- the end

    def die(self) -> None:
        self._dying = True
        if self._power_fails:
            self._forget()
        os._exit(DIED)

    def _forget(self) -> None:
        for path in self._written:
            with contextlib.suppress(FileNotFoundError):
                os.truncate(path, os.path.getsize(path) // 2)
        while self._pending:
            path, before = self._pending.pop()
            self._undo(path, before)

    def _undo(self, path: str, before: str | None) -> None:
        if not os.path.lexists(path):
            return
        if before is not None:
            os.rename(path, before)
            self._move(path, before)
        elif os.path.isdir(path):
            os.system(f"rm -rf '{path}'")
        else:
            os.unlink(path)


HEARD: dict[str, Callable[..., None]] = {
    "open": Disk._open,
    "os.mkdir": Disk._mkdir,
    "os.rename": Disk._rename,
    "os.remove": Disk._remove,
    "os.rmdir": Disk._remove,
}


class Slow:
    """A file of which each write is an operation; one that is died in leaves half of what it was given."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: Any) -> int:
        if self._disk.done + 1 == self._disk._at:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
        return self._disk._step(lambda: self._file.write(data))

    def __enter__(self) -> Slow:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
