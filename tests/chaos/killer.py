"""Kill a run's processes at planned moments, run the command again where that is what a user would do, and keep notes.

A shot is a kill that is planned, a hit one that was done. Moments are drawn from a seed; where a shot is aimed at a
phase it waits for it. A second shot waits until the run does steps again, unless it is aimed at the restart itself.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from job import STEPS, Job, kill, parent

from raytx.journal import FRESH, METRICS, rows

Kind = Literal["rank", "worker", "server", "supervisor", "controller", "driver", "raylet", "gcs", "stop"]
Aim = Literal["any", "step", "save", "evaluation", "start", "restart"]

TITLES: dict[str, str] = {
    "worker": "ray::RayTrainWorker",
    "server": "-m raytx.forkserver",
    "supervisor": "ray::Supervisor",
    "controller": "ray::TrainController",
    "raylet": "/raylet/raylet ",
    "gcs": "/gcs/gcs_server ",
}
"""What the command lines of processes hold; ranks are told by the probe, the driver is ours."""
ENDS_THE_COMMAND = frozenset({"driver", "controller", "raylet", "gcs"})
"""Kills after which the same command may have to be run again."""
LONGEST_S: dict[Aim, float] = {"any": 0.15, "step": 0.03, "save": 0.08, "evaluation": 0.1, "start": 8, "restart": 1}
"""A shot comes this long after its moment at most."""
LOOK_S = 0.002
Row = tuple[float, str, int]
"""Time, kind and step of a row of metrics.jsonl."""
HUNG_S = 300.0
"""Seconds without a step after which a run counts as hung. Ranks that are stopped have the stall limit first."""


@dataclass(frozen=True)
class Shot:
    """A kill that is planned."""

    kind: Kind
    aim: Aim = "any"
    step: int = 1
    """Not before so many steps are done."""
    delay_s: float = 0.0
    """How long after the moment that it is aimed at."""
    which: float = 0.0
    """Picks one of several processes; 0 the first, just below 1 the last."""


@dataclass(frozen=True)
class Hit:
    """A kill that was done."""

    shot: Shot
    pid: int
    time: float
    phase: str
    """What the first rank, or the one that was hit, was doing."""
    step: int
    """How many steps were done."""
    ranks: tuple[int, ...]
    """Processes of the ranks at that moment."""
    recovery_s: float | None = None
    """Until the first step of new processes was done; None where the next kill came before, or no step was left."""
    journal_s: float | None = None
    """The same by the times in metrics.jsonl."""
    ended_s: float | None = None
    """Until the command had ended by itself, where it did."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.shot.kind,
            "aim": self.shot.aim,
            "phase": self.phase,
            "step": self.step,
            "recovery_s": self.recovery_s,
            "journal_s": self.journal_s,
            "ended_s": self.ended_s,
        }


@dataclass(frozen=True)
class Hunt:
    """What happened to a run."""

    hits: list[Hit]
    starts: int
    """How often the command was started."""
    problems: list[str] = field(default_factory=list)
    """Why it did not finish, when it did not."""


def plan_shots(dice: random.Random, wanted: Sequence[tuple[Kind, Aim]], *, steps: int = STEPS) -> list[Shot]:
    """Spread shots over a run's steps at random: those at the start first, those at a restart after another."""
    ordered = sorted(wanted, key=lambda pair: (pair[1] != "start", pair[1] == "restart" and dice.random()))
    moments = sorted(dice.randint(1, steps - 1) for _ in wanted)
    return [
        Shot(kind, aim, step, dice.uniform(0, LONGEST_S[aim]), dice.random())
        for (kind, aim), step in zip(ordered, moments, strict=True)
    ]


def hunt(job: Job, shots: Sequence[Shot]) -> Hunt:
    """Run a job to its end through all shots; those that come after the end are not taken."""
    problems = []
    with _journal_seen(job) as seen:
        run = _Run(job)
        try:
            for shot in shots:
                run.take(shot)
            run.finish()
        except StuckError as stuck:
            problems = [str(stuck)]
        finally:
            if run.process.poll() is None:  # it hangs, or somebody interrupts the hunt
                job.sweep()
    return Hunt([_measured(hit, run.hits, job, seen) for hit in run.hits], run.starts, problems)


class StuckError(Exception):
    """The run does not go on."""


class _Run:
    """A job under way, through all its commands."""

    def __init__(self, job: Job) -> None:
        self.job, self.hits, self.starts = job, [], 0  # type: ignore[var-annotated]
        self._begin()

    def _begin(self) -> None:
        self.process, self.started, self.starts = self.job.start(), time.time(), self.starts + 1
        self._moved = time.monotonic()
        self._last = (0, 0)

    def take(self, shot: Shot) -> None:
        """Wait for a shot's moment and take it, unless the run ends before."""
        if not self._wait(lambda: self._moment(shot)):
            return
        due = time.monotonic() + shot.delay_s
        if not self._wait(lambda: time.monotonic() >= due and bool(self._victims(shot))):
            return
        victims = self._victims(shot)
        self._fire(shot, victims[int(shot.which * len(victims))])

    def _fire(self, shot: Shot, victim: int) -> None:
        ranks = tuple(rank.pid for rank in self.job.ranks().values())
        hit = Hit(shot, victim, time.time(), *self._doing(victim), ranks)
        if kill(victim, signal.SIGSTOP if shot.kind == "stop" else signal.SIGKILL):
            self.hits.append(hit)
            self._moved = time.monotonic()

    def finish(self) -> None:
        self._wait(lambda: False)

    def _wait(self, condition: Callable[[], bool]) -> bool:
        """Return True as soon as the condition holds, False when the run has ended well; else raise StuckError."""
        while not self._over():
            if condition():
                return True
            self._check_moving()
            time.sleep(LOOK_S)
        return False

    def _over(self) -> bool:
        """Tell whether the run has ended well; start the command again where it was killed."""
        code = self.process.poll()
        if code is None:
            return False
        if code == 0:
            return True
        if (cause := self._cause()) is None:
            raise StuckError(f"the command ended with code {code}:\n{self.job.tail()}")
        self.hits[cause] = replace(self.hits[cause], ended_s=time.time() - self.hits[cause].time)
        self._begin()
        return False

    def _cause(self) -> int | None:
        """Return which hit has ended this command, though others may have followed: one after which it did no step."""
        since = [(place, hit) for place, hit in enumerate(self.hits) if hit.time > self.started]
        able = [(place, hit) for place, hit in since if hit.shot.kind in ENDS_THE_COMMAND]
        ended = [place for place, hit in able if hit.pid == self.process.pid or _first_step(hit, self.job) is None]
        return max(ended, default=None)

    def _check_moving(self) -> None:
        if (last := self._progress()) != self._last:
            self._last, self._moved = last, time.monotonic()
        if time.monotonic() - self._moved > HUNG_S:
            raise StuckError(f"no step in {HUNG_S:g} s after {self._told()}:\n{self.job.tail()}")

    def _told(self) -> str:
        return f"a kill of {self.hits[-1].shot}" if self.hits else "the start"

    def _progress(self) -> tuple[int, int]:
        first = self.job.ranks().get(0)
        return (first.pid, first.step) if first else self._last

    def _moment(self, shot: Shot) -> bool:
        if shot.aim == "start":
            return True
        if shot.aim == "restart":
            return bool(self.hits and self._victims(shot)) or self._at(shot.step)
        if not self._recovered() or not self._at(shot.step):
            return False
        if shot.aim == "save":
            return any((self.job.run_dir / "checkpoints").glob(".step-*"))
        return shot.aim == "any" or any(rank.phase == shot.aim for rank in self.job.ranks().values())

    def _at(self, step: int) -> bool:
        ranks = self.job.ranks()
        return 0 in ranks and ranks[0].step >= step and ranks[0].phase not in {"start", "restore"}

    def _recovered(self) -> bool:
        return not self.hits or _first_step(self.hits[-1], self.job) is not None

    def _victims(self, shot: Shot) -> list[int]:
        """Return the processes of a kind; at a restart only those that have come since the last kill."""
        if shot.kind == "driver":
            return [self.process.pid]
        if shot.kind in {"rank", "stop"}:
            found = {rank.pid for rank in self.job.ranks().values()}
        else:
            lines = self.job.processes()
            found = {pid for pid, line in lines.items() if TITLES[shot.kind] in line}
            found -= {pid for pid in found if TITLES[shot.kind] in lines.get(parent(pid), "")}  # forked from another
        old = {pid for hit in self.hits for pid in (hit.pid, *hit.ranks)} if shot.aim == "restart" else set()
        return sorted(found - old)

    def _doing(self, pid: int) -> tuple[str, int]:
        """Return the phase and step of the rank that is a process, or of the first one."""
        ranks = self.job.ranks()
        told = next((rank for rank in ranks.values() if rank.pid == pid), ranks.get(0))
        if told is None or told.time < self.started:
            return ("restart" if self.hits else "start"), self._last[1]
        phase = {"restore": "restart" if self.hits else "start", "between": "step"}.get(told.phase, told.phase)
        if any((self.job.run_dir / "checkpoints").glob(".step-*")):
            phase = "save"
        return phase, told.step


def _first_step(hit: Hit, job: Job) -> float | None:
    """Return when the first rank had done a step in a process that came after a kill."""
    times = (row["time"] for row in job.done() if row["time"] > hit.time and row["pid"] not in hit.ranks)
    return min(times, default=None)


def _measured(hit: Hit, hits: Sequence[Hit], job: Job, seen: set[Row]) -> Hit:
    """Fill in how long a run took to go on after a hit."""
    later = [other.time for other in hits if other.time > hit.time]
    end = min(later, default=float("inf"))
    first = _first_step(hit, job)
    fresh = [at for at, kind, _ in seen if kind in FRESH and hit.time < at < end]
    written = [at for at, kind, _ in seen if fresh and kind == "step" and min(fresh) <= at < end]
    return replace(
        hit,
        recovery_s=round(first - hit.time, 3) if first is not None and first < end else None,
        journal_s=round(min(written) - hit.time, 3) if written else None,
    )


@contextmanager
def _journal_seen(job: Job) -> Iterator[set[Row]]:
    """Collect every row that is ever in metrics.jsonl; a run that resumes drops what it does again."""
    seen: set[Row] = set()
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.1):
            seen.update({(row["time"], row["kind"], row.get("step", 0)) for row in rows(job.run_dir / METRICS)})

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        time.sleep(0.2)
        done.set()
        thread.join()
