"""The actor that a run's keepers and its driver meet at: it begins attempts, watches them, and hands out orders."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytx import ray_internals, rendezvous
from raytx.files import write_text
from raytx.nursery import Nursery
from raytx.pulse import Pulse
from raytx.supervision import SLOW_LIMITS, Attempt, End, Supervision, Verdict
from raytx.worker import Order, Record

SAVED = {"checkpoint", "resumed"}
"""Records that tell of a checkpoint on disk."""
QUEUE_LIMIT = 10_000
"""Records that may wait for the driver; more are dropped, oldest first."""
JUDGE_EVERY_S = 1.0
STACKS_S = 5.0
"""How long a stalled group is given to write its stacks."""
UNJUDGED_S = 30.0
"""What stands for the stall limit, where a run has none, in how long a resize waits for a save."""
LAST_CALL_S = 10.0
"""How long before a node goes the ranks save a second time, to lose no more than the steps of these seconds."""
SUPERSEDED = {"settled": True, "again": True, "reports": 0}
"""The answer to a keeper whose attempt is not the one that goes on."""
STACK_LINES = 6
"""Innermost lines of a rank's main thread that are shown; the file has all."""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Supervisor:
    """One for each run. Methods that wait are coroutines; a restart forgets everything, and keepers begin anew."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._state = Supervision(max_failures=settings["max_failures"], stall_s=settings["stall_s"], tell=self._remark)
        self._records: list[Record] = []
        self._nurseries: dict[str, Any] = {}
        self._group = self._last_group = ""
        """The latest group, and the one whose attempt is the last."""
        self._began, self._groups = time.time_ns(), 0
        self._waiting: dict[int, Mapping[str, Any]] = {}
        self._order = Order()
        self._saved = 0
        self._last_calls: dict[str, float] = {}
        self._stacks: dict[int, str] | None = None
        self._last_stacks: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        self._verdict: Verdict | None = None
        self._changed = asyncio.Condition()
        self._watch: asyncio.Task[None] | None = None
        self._complaint = ""

    # ---- the driver

    async def drain(self) -> list[Record]:
        """Return the records that came since the last call."""
        records, self._records = self._records, []
        return records

    async def remark(self, text: str) -> None:
        """Tell the user something."""
        self._remark(text)

    async def save(self, within_s: float) -> bool:
        """Have the ranks save now; return whether they did within the time. They train on meanwhile and after."""
        attempt = self._state.attempt
        step = attempt.step if attempt else 0  # what is committed next may be a save from before the order
        await self.order("save")
        deadline = time.monotonic() + within_s
        while self._saved < step and attempt is not None and not attempt.over and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        return self._saved >= step

    async def resize(self) -> bool:
        """Have the ranks save, as Ray Train is about to replace them; return whether they did in time."""
        for node in self._roomy():  # new nodes load libraries while the ranks save
            self._nursery(node)
        within_s = await self._time_to_save()
        saved = await self.save(within_s)
        if not saved and self._state.attempt is not None and not self._state.attempt.over:
            self._remark(f"no checkpoint within {within_s:g} s before the resize; steps since the last are done again")
        self._state.resized()
        return saved

    async def _time_to_save(self) -> float:
        """Return for how long a resize may wait for a save: a node that goes will not, growth can."""
        if (await asyncio.to_thread(ray_internals.draining_nodes)).keys() & self._nodes():
            return float(self._settings["grace_s"])
        return float(SLOW_LIMITS * (self._settings["stall_s"] or UNJUDGED_S))

    def _nodes(self) -> set[str]:
        """Return the nodes that ranks run on."""
        return {place["node_id"] for place in self._state.attempt.places.values()} if self._state.attempt else set()

    def _roomy(self) -> list[str]:
        """Return the nodes that have room for a rank right now."""
        one = self._settings["resources"]
        free = ray_internals.available_resources_per_node()
        return [node for node, left in free.items() if all(left.get(name, 0.0) >= one[name] for name in one)]

    async def order(self, kind: Literal["save", "stop"]) -> None:
        """Have the ranks save, or save and end; those that have not begun need not."""
        if self._order.kind != "stop":
            self._order = Order(self._order.number + 1, kind)
        if kind == "stop":
            self._state.told_to_end = True
            async with self._changed:
                self._waiting = {}
                self._changed.notify_all()

    async def told_to_end(self) -> bool:
        return self._state.told_to_end

    async def lost(self, text: str, *, rank: int) -> None:
        """Take note that Ray Train lost workers, the given rank's first, in words."""
        self._state.lost(text, rank=rank)

    async def warm(self, node_id: str) -> None:
        """Have a node import what ranks will need, before they are asked for."""
        self._nursery(node_id)

    # ---- keepers

    async def group(self) -> str:
        """Return the name of a new group of keepers; later ones are greater, also after a restart."""
        self._groups += 1
        return f"{self._began:020}-{self._groups:06}"

    async def join(self, group: str, rank: int, world_size: int, place: Mapping[str, Any]) -> dict[str, Any]:
        """Wait until all ranks of a group have come; return the attempt that they begin together."""
        self._watch = self._watch or asyncio.create_task(self._watched())
        if self._state.told_to_end or group < self._group:  # the latter was cut off, and others are in its place
            return {"attempt": 0, "ordered": self._state.told_to_end}
        if (lost := self._state.exhausted()) is not None:
            return {"attempt": 0, "verdict": asdict(lost)}
        if group > self._group:
            self._group, self._waiting = group, {}
        before = self._state.attempt.number if self._state.attempt else 0
        self._waiting[rank] = place
        async with self._changed:
            self._changed.notify_all()
            if len(self._waiting) == world_size:
                self._begin(world_size)
            await self._changed.wait_for(lambda: rank not in self._waiting or group != self._group)
        return self._told(group, after=before)

    def _begin(self, world_size: int) -> None:
        attempt = self._state.begin(world_size, self._waiting)
        self._last_group, self._waiting, self._stacks, self._verdict = self._group, {}, None, None
        if self._order.kind == "save":
            self._order = replace(self._order, kind="")
        attempt.places[0] = {**attempt.places[0], "meeting_point": self._meeting_point(attempt)}
        self._changed.notify_all()

    def _meeting_point(self, attempt: Attempt) -> str:
        first = attempt.places[0]
        if self._settings["local"]:
            return rendezvous.in_file(Path(first["directory"]), f"rendezvous-{uuid.uuid4().hex}")
        return rendezvous.at(first["address"], first["port"])

    def _told(self, group: str, *, after: int) -> dict[str, Any]:
        """Return the attempt that has begun since then; or that none will for this group, and whether by order."""
        attempt = self._state.attempt
        if attempt is None or attempt.number <= after or group != self._group:
            return {"attempt": 0, "ordered": self._state.told_to_end}
        meeting_point = attempt.places[0]["meeting_point"]
        return {"attempt": attempt.number, "meeting_point": meeting_point, "saved": self._saved}

    def _current(self, group: str, number: int) -> Attempt | None:
        attempt = self._state.attempt
        return attempt if attempt is not None and group == self._group and attempt.number == number else None

    async def nursery(self, node_id: str) -> str:
        """Return the address of a node's fork server."""
        asked = self._nursery(node_id)
        with contextlib.suppress(ray.exceptions.RayActorError):
            return await asked.address.remote()  # type: ignore[no-any-return]
        if self._nurseries.get(node_id) is asked:  # another keeper of the node may have had it replaced
            del self._nurseries[node_id]
        return await self._nursery(node_id).address.remote()  # type: ignore[no-any-return]

    def _nursery(self, node_id: str) -> Any:
        if node_id not in self._nurseries:
            here = NodeAffinitySchedulingStrategy(node_id, soft=False)
            self._nurseries[node_id] = Nursery.options(scheduling_strategy=here).remote(  # type: ignore[attr-defined]
                self._settings["plan"], self._settings["environment"]
            )
        return self._nurseries[node_id]

    async def beat(
        self, group: str, number: int, rank: int, pulse: Mapping[str, Any], records: list[Record], reports: int
    ) -> dict[str, Any]:
        """Take a rank's pulse, its records and how many reports it has made; return what its keeper is to do."""
        self._records = (self._records + records)[-QUEUE_LIMIT:]
        if saved := [record["step"] for record in records if record["kind"] in SAVED]:
            self._saved = max(saved)
            async with self._changed:
                self._changed.notify_all()
        attempt = self._current(group, number)
        if attempt is None:
            return {"over": True, "reports": 0}
        self._state.reported(rank, reports)
        if rank not in attempt.ends:
            self._state.beat(rank, Pulse(**pulse))
        told = {"order": asdict(self._order), "dump": self._stacks is not None}
        return {"over": attempt.over, "reports": attempt.granted, **told}

    async def dumped(self, group: str, number: int, rank: int, stacks: str) -> None:
        """Take a rank's stacks, which `beat` asked for."""
        if self._current(group, number) is not None and self._stacks is not None:
            self._stacks[rank] = stacks

    async def ended(self, group: str, number: int, rank: int, end: Mapping[str, Any], made: int) -> dict[str, Any]:
        """Take how a rank ended, and how many reports its keeper has made.

        Returns, when all have ended, what follows: another attempt, or the run's end; before that, when there are
        reports to be made that others are making.
        """
        attempt = self._current(group, number)
        if attempt is None:
            return SUPERSEDED
        async with self._changed:
            if rank not in attempt.ends:
                self._state.ended(rank, End(**end))
            self._changed.notify_all()
            await self._changed.wait_for(
                lambda: self._state.settled() or self._current(group, number) is None or attempt.granted > made
            )
        if self._current(group, number) is None:
            return SUPERSEDED
        if not self._state.settled():
            return {"settled": False, "reports": attempt.granted}
        self._verdict = self._verdict or self._state.verdict()
        told = {"end": asdict(self._verdict.end), "rank": self._verdict.rank}
        return {"settled": True, "again": self._verdict.again, "reports": self._state.reportable(), **told}

    # ---- watching

    async def _watched(self) -> None:
        while True:
            await asyncio.sleep(JUDGE_EVERY_S)
            try:
                await self._look()
            except Exception as error:  # Ray's control process may not answer for a while; watching must go on
                self._complain(f"cannot watch the run: {type(error).__name__}: {error}")

    async def _look(self) -> None:
        if (stall := self._state.judge()) is not None:
            await self._end_stalled(*stall)
        self._end_keepers(self._state.overdue())
        if self._group == self._last_group:
            self._end_keepers(self._state.absent(self._waiting))
        await self._look_for_drains()

    def _complain(self, text: str) -> None:
        if text != self._complaint:
            self._complaint = text
            self._remark(text)

    async def _look_for_drains(self) -> None:
        """Have the ranks save when a node of theirs is about to go, at once and shortly before it does."""
        if self._state.attempt is None or self._state.attempt.over:
            return
        held = self._nodes()
        draining = await asyncio.to_thread(ray_internals.draining_nodes)
        for node, at in draining.items():
            if node in held and node not in self._last_calls:
                self._last_calls[node] = at - LAST_CALL_S
                self._remark(f"node {node[:6]} is going away{_in(at)}: saving a checkpoint")
                await self.order("save")
            elif node in held and time.time() >= self._last_calls[node]:
                self._last_calls[node] = math.inf
                await self.order("save")

    async def _end_stalled(self, rank: int, stall: End) -> None:
        """Collect every rank's stacks, tell them, and let keepers end what is left."""
        attempt = self._state.attempt
        assert attempt is not None
        stacks = await self._collected(attempt)
        if not attempt.over:  # otherwise what ended it meanwhile is the cause that is told
            attempt.stalled, attempt.over = (rank, stall), True
            self._tell_stacks(stall.text, stacks)
        if attempt is self._state.attempt:
            self._end_keepers(self._state.silent())

    async def _collected(self, attempt: Attempt) -> Mapping[int, str]:
        """Ask for every rank's stacks; return those that come in time, or before the attempt is over."""
        stacks: dict[int, str] = {}
        self._stacks = stacks  # another attempt will have others
        answering = attempt.world_size - len(attempt.ends) - len(self._state.silent())
        deadline = time.monotonic() + STACKS_S
        while len(stacks) < answering and not attempt.over and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        return stacks

    def _end_keepers(self, ranks: Sequence[int]) -> None:
        """End keepers that do not answer; Ray Train replaces the group."""
        places = self._state.attempt.places if self._state.attempt else {}
        for rank in ranks:
            self._remark(f"the worker of rank {rank} does not answer; it is ended")
            ray.kill(places[rank]["keeper"])

    def _tell_stacks(self, stall: str, stacks: Mapping[int, str]) -> None:
        self._remark(f"{stall}. Every rank's stack:")
        for rank, text in sorted(stacks.items()):
            self._remark(f"rank {rank}: {innermost(text)}")
        full = "\n".join(f"rank {rank}\n{text}\n" for rank, text in sorted(stacks.items()))
        self._last_stacks = asyncio.create_task(self._keep_stacks(f"{stall}\n\n{full}"))

    async def _keep_stacks(self, text: str) -> None:
        """Write stacks into the run's directory: on a thread, as its disk may be what hangs, and on one at a time."""
        path = Path(self._settings["run_dir"]) / "stalls" / f"{time.strftime('%Y%m%d-%H%M%S')}.txt"
        async with self._writing:
            try:
                await asyncio.to_thread(_write, path, text)
            except OSError as error:
                self._remark(f"the stacks cannot be written: {error}")
            else:
                self._remark(f"the stacks in full are in {path}")

    def _remark(self, text: str) -> None:
        self._records.append({"kind": "remark", "text": text})


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    write_text(path, text)


def _in(at: float) -> str:
    return f" in {at - time.time():.0f} s" if math.isfinite(at) else ""


def innermost(stacks: str) -> str:
    """Return the innermost lines of a stack that faulthandler wrote last, innermost first."""
    head, _, main = stacks.rpartition("(most recent call first):")
    lines = (main if head else stacks).strip().splitlines()
    return "\n".join(lines[:STACK_LINES])
