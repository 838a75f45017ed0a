"""What a rank is doing right now, in a small mapped file: readable from outside, also when the rank is stuck.

A rank notes each phase that it enters; that costs a microsecond and no system call. Its keeper reads the file.
"""

from __future__ import annotations

import mmap
import statistics
import struct
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

PHASES = (
    "start", "restore", "data", "forward", "backward", "collective", "update", "evaluation", "checkpoint",
    "council", "end",
)  # fmt: skip
"""In the order in which a run meets them."""
SLOW = frozenset({"start", "restore", "checkpoint", "end"})
"""Phases that may be long by nature: libraries load, storage is slow."""
WINDOW = 21
"""Steps whose median is the usual one."""
_LAYOUT = struct.Struct("<QqQddd")


@dataclass(frozen=True)
class Pulse:
    """A moment of a rank."""

    beats: int = 0
    """Phases entered so far."""
    step: int = 0
    """Updates done."""
    phase: str = PHASES[0]
    age_s: float = 0.0
    """Seconds since the phase was entered."""
    step_s: float = 0.0
    """Median seconds of the last steps; 0 before the first is done."""
    longest_s: float = 0.0
    """Longest stay in this phase before the present one; 0 where there was none."""
    stopped: bool = False
    """Whether the process is stopped, by SIGSTOP or a debugger; its keeper looks, as it cannot tell itself."""


class Pen:
    """Writes a rank's pulse."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(_LAYOUT.size))
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), _LAYOUT.size)
        self._beats = self._step = 0
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._median = 0.0
        self._phase, self._entered = PHASES[0], time.monotonic()
        self._longest = dict.fromkeys(PHASES, 0.0)
        self.enter(PHASES[0])

    def enter(self, phase: str) -> None:
        now = time.monotonic()
        self._longest[self._phase] = max(self._longest[self._phase], now - self._entered)
        self._phase, self._entered = phase, now
        self._beats += 1
        place = PHASES.index(phase)
        _LAYOUT.pack_into(self._map, 0, self._beats, self._step, place, now, self._median, self._longest[phase])

    def at(self, step: int) -> None:
        """Note how many updates are done; readers learn of it with the next phase."""
        self._step = step

    def stepped(self, step: int, seconds: float) -> None:
        """Note that an update is done, and how long it took."""
        self.at(step)
        self._seconds.append(seconds)
        self._median = statistics.median(self._seconds)


_pen: Pen | None = None


def begin(path: Path) -> None:
    """Have this process write its pulse to a file from now on."""
    global _pen
    _pen = Pen(path)


def phase(name: str) -> None:
    """Note that this process enters a phase; does nothing where nobody asked for its pulse."""
    if _pen is not None:
        _pen.enter(name)


def at(step: int) -> None:
    """Note that this process goes on from a step."""
    if _pen is not None:
        _pen.at(step)


def stepped(step: int, seconds: float) -> None:
    """Note that this process has done an update."""
    if _pen is not None:
        _pen.stepped(step, seconds)


def read(path: Path) -> Pulse:
    """Return the pulse that a process of this machine wrote last; a fresh one before it wrote any."""
    data = path.read_bytes() if path.is_file() else b""
    if len(data) < _LAYOUT.size:
        return Pulse()
    beats, step, place, at, median, longest = _LAYOUT.unpack(data)
    if not beats:
        return Pulse()
    return Pulse(beats, step, PHASES[place % len(PHASES)], max(0.0, time.monotonic() - at), median, longest)
