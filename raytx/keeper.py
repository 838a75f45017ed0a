"""A Ray Train worker: it keeps one rank running, passes messages on, and never trains itself.

It imports neither torch nor the plan's plugins, so it is there quickly, and nothing that a rank does can stop it.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective

from raytx import cluster, pulse, rendezvous
from raytx.channel import Channel
from raytx.pulse import Pulse
from raytx.supervision import End

BEAT_S = 0.25
LEAVE_S = 10.0
"""How long a process that has ended, or was ended, is waited for."""
STACK_S = 0.5
"""How long a process is given to write its stacks."""
STOPPED = {"T", "t"}
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}
"""Signals of which faulthandler leaves a stack."""


def keep(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keep this worker's rank running to the run's end, and return that; what Ray Train runs on every worker."""
    context = ray.train.get_context()
    named = ray.get(config["supervisor"].group.remote()) if context.get_world_rank() == 0 else None
    group = ray.train.collective.broadcast_from_rank_zero(named)
    prefix = f"rank-{os.getpid()}-"  # by which it is known whose it was, where this process is killed
    with tempfile.TemporaryDirectory(prefix=prefix, dir=cluster.private_directory()) as directory:
        keeper = Keeper(config, group, context.get_world_rank(), context.get_world_size(), Path(directory))
        return keeper.run()


class Keeper:
    """One rank's keeper, over as many attempts as there are."""

    def __init__(self, config: Mapping[str, Any], group: str, rank: int, world_size: int, directory: Path) -> None:
        self._config, self._supervisor = config, config["supervisor"]
        self._group, self._rank, self._world_size, self._directory = group, rank, world_size, directory
        self._node_id = ray.get_runtime_context().get_node_id()
        self._address = ray.util.get_node_ip_address()
        self._reports = Reports()

    def run(self) -> dict[str, Any]:
        """Begin attempts with the other keepers until one comes to an end that counts."""
        while True:
            begun = ray.get(self._supervisor.join.remote(self._group, self._rank, self._world_size, self._place()))
            if not begun["attempt"]:
                return begun.get("verdict") or {"ordered": begun["ordered"]}
            end = self._attempt(begun)
            verdict = self._verdict(begun["attempt"], end)
            if not verdict["again"]:
                return verdict

    def _verdict(self, number: int, end: End) -> dict[str, Any]:
        """Tell how the rank ended; return what follows when all have, making reports meanwhile that others wait for."""
        while True:
            told = self._supervisor.ended.remote(self._group, number, self._rank, asdict(end), self._reports.made)
            verdict: dict[str, Any] = ray.get(told)
            self._reports.make(verdict["reports"])
            if verdict["settled"]:
                return verdict

    def _place(self) -> dict[str, Any]:
        port = rendezvous.free_port(self._address) if self._rank == 0 and not self._config["local"] else 0
        return {
            "address": self._address,
            "node_id": self._node_id,
            "port": port,
            "directory": str(self._directory),
            "keeper": ray.get_runtime_context().current_actor,
        }

    def _attempt(self, begun: Mapping[str, Any]) -> End:
        """Have a rank process, and watch it to its end."""
        number = begun["attempt"]
        directory = Path(tempfile.mkdtemp(prefix=f"{number}-", dir=self._directory))  # a new supervisor counts anew
        path = ray.get(self._supervisor.nursery.remote(self._node_id))
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
            connection.connect(path)
            channel = Channel(connection)
            channel.send(self._job(begun, directory))
            self._reports = Reports()
            return Watch(channel, directory, self._line(number), self._reports, self._config["grace_s"]).run()

    def _job(self, begun: Mapping[str, Any], directory: Path) -> dict[str, Any]:
        return {
            "plan": self._config["plan"],
            "rank": self._rank,
            "world_size": self._world_size,
            "meeting_point": begun["meeting_point"],
            "saved": begun["saved"],
            "backend": self._config["backend"],
            "timeout_s": self._config["timeout_s"],
            "directory": str(directory),
            "environment": environment(use_gpu=self._config["use_gpu"], local=self._config["local"]),
            "node": cluster.node_name(self._address, self._node_id),
        }

    def _line(self, number: int) -> Line:
        """Return the supervisor's methods for this rank of an attempt."""

        def call(method: str) -> Callable[..., Any]:
            bound = getattr(self._supervisor, method)
            return lambda *said: ray.get(bound.remote(self._group, number, self._rank, *said))

        return Line(call("beat"), call("dumped"))


def environment(*, use_gpu: bool, local: bool) -> dict[str, str]:
    """Return the variables in which ranks, or their nodes, differ; asked in a Ray Train worker, for its rank."""
    context, address = ray.train.get_context(), ray.util.get_node_ip_address()
    found = {
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if use_gpu and visible:
        mine = visible.split(",").index(str(ray.get_gpu_ids()[0]))
        found |= {"CUDA_VISIBLE_DEVICES": visible, "RAYTX_DEVICE": f"cuda:{mine}"}
    if not local and "GLOO_SOCKET_IFNAME" not in os.environ and (interface := rendezvous.interface(address)):
        found |= {"GLOO_SOCKET_IFNAME": interface}
    return found


class Reports:
    """Evaluations of an attempt, for Ray Train: it takes one from all workers at once, and would wait for ever for one
    whose rank has died before. So each is made when every rank is known to have it."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, Any]] = []
        self.made = 0

    def make(self, count: int) -> None:
        """Make the first so many, those left to be made."""
        for metrics in self.metrics[self.made : count]:
            ray.train.report(metrics)
            self.made += 1


@dataclass(frozen=True)
class Line:
    """What a watch says to the supervisor."""

    beat: Callable[[dict[str, Any], list[dict[str, Any]], int], dict[str, Any]]
    """Pass pulse, records and the number of reports on; return what is to be done."""
    dumped: Callable[[str], None]
    """Pass stacks on."""


class Watch:
    """Watches one rank process: passes on what it says, and carries out what the supervisor wants done with it."""

    def __init__(self, channel: Channel, directory: Path, line: Line, reports: Reports, grace_s: float) -> None:
        self._channel, self._directory, self._line, self._grace_s = channel, directory, line, grace_s
        self._reports = reports
        self._pid: int | None = None
        self._records: list[dict[str, Any]] = []
        self._end: End | None = None
        self._ordered, self._deadline, self._leave_by = 0, math.inf, math.inf
        self._asked_at = time.monotonic()
        self._killed, self._dumped, self._gone = False, False, False
        self._why = self._late = ""

    def run(self) -> End:
        """Return how the process ended."""
        next_beat = 0.0
        while not self._gone:
            try:
                with contextlib.suppress(TimeoutError):
                    self._take(self._channel.receive(timeout_s=max(0.0, next_beat - time.monotonic())))
            except EOFError:
                self._gone = True
            if time.monotonic() >= next_beat or self._gone:
                self._tell()
                next_beat = time.monotonic() + BEAT_S
            if time.monotonic() > self._deadline:
                self._kill(self._late)
            if time.monotonic() > self._leave_by:  # the fork server ends it when it finds the connection closed
                self._gone = True

        return self._end or self._lost()

    def _take(self, message: Mapping[str, Any]) -> None:
        match message:
            case {"record": record}:
                self._records.append(record)
            case {"report": metrics}:
                self._reports.metrics.append(metrics)
            case {"started": pid}:
                self._pid = pid
            case {"done": done}:
                self._ends(End("done", step=done["step"]))
            case {"stopped": text, "at": at}:
                self._ends(End("stopped", text, at))
            case {"failed": text, "at": at, "traceback": told}:
                self._ends(End("failed", text, at, told))
            case {"exit": code, "peak_bytes": peak}:
                self._end = self._end or self._exited(code, peak)
                self._gone = True  # others that it started may hold the connection

    def _ends(self, end: End) -> None:
        """Take what the rank says of its end; its process goes next, but is not waited for if it does not."""
        self._end, self._leave_by = end, time.monotonic() + LEAVE_S

    def _exited(self, code: int, peak_bytes: int) -> End:
        """Return the end of a process that did not say why."""
        if self._killed:
            return End("ended", self._why, time.time())
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        hint = ", somebody's or the kernel's for want of memory" if code == -signal.SIGKILL else ""
        stacks = self._stacks() if -code in CRASHES else ""
        return End(
            "killed", f"was ended by {name}{hint} (peak memory {peak_bytes / 2**20:,.0f} MiB)", time.time(), stacks
        )

    def _lost(self) -> End:
        if self._killed:
            return End("ended", self._why, time.time())
        return End("killed", "is gone, and the process that forked it", time.time())

    def _tell(self) -> None:
        """Pass pulse and records on; do what the answer wants."""
        seen = self._pulse()
        records, self._records = self._records, []
        answer = self._line.beat(asdict(seen), records, len(self._reports.metrics))
        self._reports.make(answer["reports"])
        if answer["over"]:
            self._kill()
            return
        if answer["dump"] and not self._dumped:
            self._dumped = True
            self._line.dumped(self._dump())
        order = answer["order"]
        if order["number"] > self._ordered:
            self._ordered = order["number"]
            self._pass_on(order, seen)

    def _pulse(self) -> Pulse:
        seen = pulse.read(self._directory / "pulse")
        if self._pid is None or not seen.beats:
            return replace(seen, age_s=time.monotonic() - self._asked_at)
        return replace(seen, stopped=_state(self._pid) in STOPPED)

    def _pass_on(self, order: Mapping[str, Any], seen: Pulse) -> None:
        with contextlib.suppress(OSError):
            self._channel.send(dict(order))
        if order["kind"] == "stop":
            nothing_to_save = seen.phase in {"start", "restore"}
            self._deadline = time.monotonic() + (0 if nothing_to_save else self._grace_s)
            self._late = "" if nothing_to_save else f"had not saved within scaling.grace_s={self._grace_s:g} s"

    def _kill(self, why: str = "") -> None:
        """End the process, unless it is ending by itself."""
        if self._end is not None:
            return
        if not self._killed:
            self._killed, self._why, self._leave_by = True, why, time.monotonic() + LEAVE_S
        if self._pid is None:  # none was forked yet, and none will be for a connection that is closed
            self._gone = True
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)

    def _dump(self) -> str:
        """Have the process write its stacks, and return them."""
        if self._pid is None:
            return "no process yet"
        if (state := _state(self._pid)) in STOPPED:
            return "the process is stopped (by SIGSTOP, or a debugger)"
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGUSR1)
        time.sleep(STACK_S)
        return self._stacks() or f"the process (state {state}) writes no stack"

    def _stacks(self) -> str:
        path = self._directory / "stacks"
        return path.read_text(errors="replace") if path.is_file() else ""


def _state(pid: int) -> str:
    """Return a process's state letter as the kernel has it; empty where it does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
