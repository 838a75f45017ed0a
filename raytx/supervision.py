"""Which ranks run, how they are doing, and what is to happen next: the judgement behind the supervisor, without Ray.

A group is Ray Train's: its workers are the keepers, one for each rank. An attempt is one set of rank processes, which
the keepers of a group start together. When a rank ends otherwise than it should, the attempt is over: every keeper
ends its rank, and all start the next attempt, which goes on from the last checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raytx.pulse import SLOW, Pulse

STALL_STEPS = 5
"""Trailing median steps, or longest stays in evaluation, that are a stall where that is longer than the limit."""
SLOW_LIMITS = 20
"""Limits that may pass in a phase that is long by nature."""
SILENCE_S = 10.0
"""A keeper reports several times a second; beyond this its process, or its node, does not work."""
OVERDUE_S = 60.0
"""How long keepers may take to end their ranks, or to come to the next attempt; it is a matter of a second."""
SAME_STEP = 3
"""Errors in a row without one step between them that end a run: the next attempt would meet the same."""

UNHEARD = Pulse()
"""Of a rank whose keeper has not reported yet: it waits for its node's fork server, which may be starting."""
NOT_ANEW = "the run was told to end, so it is not started anew"

Kind = Literal["done", "stopped", "failed", "killed", "ended"]


@dataclass(frozen=True)
class End:
    """How a rank process ended."""

    kind: Kind
    """done: it trained to its end. stopped: the user must mend something. failed: it raised. killed: a signal ended it.
    ended: its keeper ended it, since the attempt was over."""
    text: str = ""
    at: float = 0.0
    """When, in seconds since the epoch."""
    details: str = ""
    """Traceback or stacks."""
    step: int | None = None


@dataclass
class Attempt:
    """One set of rank processes."""

    number: int
    world_size: int
    places: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    """What each keeper told of where it is."""
    pulses: dict[int, tuple[float, Pulse]] = field(default_factory=dict)
    """The last pulse of each rank, and when it came, by this process's clock."""
    stopped: dict[int, float] = field(default_factory=dict)
    """Since when each rank whose process is stopped has been found so at every look."""
    ends: dict[int, End] = field(default_factory=dict)
    over: bool = False
    over_since: float | None = None
    """When it was first seen to be over and not settled."""
    awaited_since: float | None = None
    """When a keeper of it was first seen to wait for the others to begin the next."""
    reports: dict[int, int] = field(default_factory=dict)
    """How many evaluations each rank has reported."""
    granted: int = 0
    """How many of them keepers are to pass on to Ray Train while the attempt goes on."""
    leaving: bool = False
    """Whether its workers are about to be replaced by another number of them: nobody need answer any more."""
    stalled: tuple[int, End] | None = None
    """Who was missing, where it was ended for a stall, and in which words."""

    @property
    def step(self) -> int:
        return max((pulse.step for _, pulse in self.pulses.values()), default=0)


@dataclass(frozen=True)
class Verdict:
    """What follows when an attempt is over."""

    again: bool
    """Whether the keepers are to ask for another attempt; they get none where the run was told to end."""
    end: End = field(default_factory=lambda: End("done"))
    rank: int = 0


class Supervision:
    """The state of a run's attempts. Times are in seconds."""

    def __init__(
        self,
        *,
        max_failures: int,
        stall_s: float | None,
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_failures, self._stall_s, self._tell, self._clock = max_failures, stall_s, tell, clock
        self.failures = 0
        self.told_to_end = False
        """Whether the run is to end: what follows then is no failure of its own."""
        self.attempt: Attempt | None = None
        self._loss = Verdict(again=False)
        """What follows from how workers were lost last, where no restart is left."""
        self._errors_at: tuple[int, int] = (-1, 0)
        """The step at which the last error came, and how many came there in a row."""

    # ---- attempts

    def begin(self, world_size: int, places: Mapping[int, Mapping[str, Any]]) -> Attempt:
        number, now = self.attempt.number + 1 if self.attempt else 1, self._clock()
        unheard = {rank: (now, UNHEARD) for rank in range(world_size)}
        self.attempt = Attempt(number, world_size, dict(places), unheard)
        return self.attempt

    def beat(self, rank: int, pulse: Pulse) -> None:
        assert self.attempt is not None
        attempt, now = self.attempt, self._clock()
        attempt.pulses[rank] = (now, pulse)
        attempt.stopped = {**({rank: now} if pulse.stopped else {}), **attempt.stopped}
        if not pulse.stopped:
            attempt.stopped.pop(rank, None)

    def ended(self, rank: int, end: End) -> None:
        assert self.attempt is not None
        self.attempt.ends[rank] = end
        if end.kind != "done":
            self.attempt.over = True

    def settled(self) -> bool:
        """Tell whether every rank of the attempt has ended."""
        return self.attempt is not None and len(self.attempt.ends) == self.attempt.world_size

    def verdict(self) -> Verdict:
        """Return what follows from a settled attempt; told once, as it counts the failure."""
        assert self.attempt is not None
        attempt = self.attempt
        if all(end.kind == "done" for end in attempt.ends.values()):
            return Verdict(again=False, end=attempt.ends[0])
        rank, end = attempt.stalled or cause(attempt.ends)
        if end.kind == "stopped":
            return Verdict(again=False, end=end, rank=rank)
        if self.told_to_end:
            if end.kind != "ended" or end.text:
                self._tell(f"{gist(rank, end)}; {NOT_ANEW}")
            return Verdict(again=True, end=end, rank=rank)
        again = self._counts(end, attempt.step)
        then = f"starting anew from the last checkpoint ({self._left()})" if again else self._why_not(end)
        self._tell(f"{'stalled' if attempt.stalled else gist(rank, end)}; {then}")
        return Verdict(again=again, end=end, rank=rank)

    def lost(self, text: str, *, rank: int) -> None:
        """Count workers that Ray Train lost, the given rank's first; it replaces them itself."""
        if self.attempt is not None:
            self.attempt.over = True
        if self.told_to_end:
            self._tell(f"{text}; {NOT_ANEW}")
            return
        self.failures += 1
        self._loss = Verdict(again=False, end=End("failed", text, details=text), rank=rank)
        then = (
            f"replacing the workers ({self._left()})" if self.failures <= self._max_failures else "no restart is left"
        )
        self._tell(f"{text}; {then}")

    def exhausted(self) -> Verdict | None:
        """Return how the run ends, when more workers were lost than may be; asked when others in their place begin."""
        return self._loss if self.failures > self._max_failures else None

    def overdue(self) -> list[int]:
        """Return, once, the ranks that have not ended long after their attempt was over: somebody does not answer."""
        attempt, now = self.attempt, self._clock()
        if attempt is None or attempt.leaving or not attempt.over or self.settled():
            return []
        if attempt.over_since is None:
            attempt.over_since = now
        if now - attempt.over_since < OVERDUE_S:
            return []
        attempt.over_since = math.inf
        return [rank for rank in attempt.places if rank not in attempt.ends]

    def absent(self, waiting: Collection[int]) -> list[int]:
        """Return, once, the ranks that have not come to the next attempt long after others of the group did."""
        attempt, now = self.attempt, self._clock()
        if attempt is None or attempt.leaving or not waiting:
            return []
        if attempt.awaited_since is None:
            attempt.awaited_since = now
        if now - attempt.awaited_since < OVERDUE_S:
            return []
        attempt.awaited_since = math.inf
        return [rank for rank in attempt.places if rank not in waiting]

    def reported(self, rank: int, count: int) -> None:
        """Take how many evaluations a rank has reported.

        Ray Train takes each from all workers at once, so one is granted when every rank has it. After the first end no
        more are, until all have ended: their keepers may be waiting for that.
        """
        assert self.attempt is not None
        self.attempt.reports[rank] = count
        if not self.attempt.ends:
            self.attempt.granted = self.reportable()

    def reportable(self) -> int:
        """Return how many evaluations every rank has reported."""
        assert self.attempt is not None
        return min(self.attempt.reports.get(rank, 0) for rank in range(self.attempt.world_size))

    def resized(self) -> None:
        """Take note that healthy workers will be gone and others come, which is no failure."""
        if self.attempt is not None:
            self.attempt.leaving = True

    def _counts(self, end: End, step: int) -> bool:
        """Count a failure; tell whether another attempt may follow."""
        self.failures += 1
        at, times = self._errors_at
        self._errors_at = (step, times + 1 if at == step else 1) if end.kind == "failed" else (-1, 0)
        return self.failures <= self._max_failures and self._errors_at[1] < SAME_STEP

    def _left(self) -> str:
        return f"restart {self.failures} of at most {self._max_failures}"

    def _why_not(self, end: End) -> str:
        if end.kind == "failed" and self._errors_at[1] >= SAME_STEP and self.failures <= self._max_failures:
            return f"that was the {SAME_STEP}rd time at this step, so no other attempt is made"
        return "no restart is left (scaling.max_failures)"

    # ---- stalls

    def judge(self) -> tuple[int, End] | None:
        """Return who is missing, and in which words, when nobody has made progress for longer than the limit."""
        attempt, now = self.attempt, self._clock()
        if attempt is None or attempt.over or attempt.leaving or self._stall_s is None:
            return None
        if silent := self.silent():
            rank = silent[0]
            return rank, _stall(
                f"the worker of rank {rank} has not been heard of for {now - attempt.pulses[rank][0]:.0f} s"
            )
        running = {rank: seen for rank, seen in attempt.pulses.items() if rank not in attempt.ends}
        idle = min((now - came + pulse.age_s for came, pulse in running.values()), default=0.0)
        limit = self.limit([pulse for _, pulse in running.values()])
        if idle <= limit:
            return None
        rank = missing({rank: pulse for rank, (_, pulse) in running.items()})
        pulse = running[rank][1]
        why = "its process is stopped" if pulse.stopped else "it is the furthest behind"
        return rank, _stall(
            f"rank {rank} is missing: nobody has made progress for {idle:.0f} s (limit {limit:.0f} s), and {why}, in "
            f"{pulse.phase} after step {pulse.step}"
        )

    def silent(self) -> list[int]:
        """Return the ranks whose keepers do not report any more."""
        if self.attempt is None:
            return []
        now, limit = self._clock(), max(SILENCE_S, self._stall_s or 0.0)
        return [
            rank
            for rank, (came, pulse) in self.attempt.pulses.items()
            if rank not in self.attempt.ends and now - came > limit * (SLOW_LIMITS if pulse is UNHEARD else 1)
        ]

    def limit(self, pulses: list[Pulse]) -> float:
        """Return how long a group in these phases may go without progress, in seconds.

        A first step, or batch of an evaluation, compiles kernels. A process that stays stopped does nothing slowly.
        """
        assert self.attempt is not None
        assert self._stall_s is not None
        stays = [pulse.longest_s for pulse in pulses if pulse.phase == "evaluation"]
        usual = max([self._stall_s, *(STALL_STEPS * seconds for seconds in (*stays, *(p.step_s for p in pulses)))])
        slow = any(pulse.phase in SLOW or not pulse.step_s for pulse in pulses) or 0.0 in stays
        if slow and all(self._clock() - since < usual for since in self.attempt.stopped.values()):
            return usual * SLOW_LIMITS
        return usual


def _stall(text: str) -> End:
    return End("killed", text, details=text)  # a text that names its rank


def missing(pulses: Mapping[int, Pulse]) -> int:
    """Return the rank that the others wait for: stopped, or with the fewest phases behind it and longest in its own."""
    return min(pulses, key=lambda rank: (not pulses[rank].stopped, pulses[rank].beats, -pulses[rank].age_s))


def cause(ends: Mapping[int, End]) -> tuple[int, End]:
    """Return the end that brought the others about.

    When a process dies, the others fail with a broken connection, which tells nothing: a rank that was killed comes
    first, then what the user must mend, then the earliest error.
    """
    order = {"killed": 0, "stopped": 1, "failed": 2, "ended": 3, "done": 4}
    return min(ends.items(), key=lambda item: (order[item[1].kind], item[1].at, item[0]))


def gist(rank: int, end: End) -> str:
    """Return how a rank ended, in a line."""
    lines = end.text.strip().splitlines() or [end.kind]
    return f"rank {rank} {lines[0] if end.kind in ('killed', 'ended') else f'failed ({lines[-1].strip()})'}"
