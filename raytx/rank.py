"""A rank: a process of its own, without Ray, that trains its part of a plan and talks to its keeper.

It is forked by the fork server, or run as `python -m raytx.rank <channel> <job>` with two inherited descriptors.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytx import mirror, pulse, rendezvous, worker
from raytx.channel import Channel
from raytx.errors import RaytxError
from raytx.journal import FED, Journal
from raytx.plan import Plan
from raytx.worker import Order, Record

QUEUE_LIMIT = 10_000
"""Records that may wait to be written; more are dropped rather than slow a step down, except for the ledger's."""
FLUSH_S = 0.2
FLUSH_LIMIT_S = 60.0
"""How long a checkpoint waits for the journal's disk, before it is not saved."""
LEAVE_S = 10.0
"""How long the end waits for it."""
PARENT_EVERY_S = 1.0


@dataclass(frozen=True)
class Job:
    """What a keeper asks of a rank. Plain data."""

    plan: dict[str, Any]
    rank: int
    world_size: int
    meeting_point: str
    backend: str
    timeout_s: float
    """How long a collective may take."""
    directory: str
    """Where pulse and stacks of this process are."""
    environment: dict[str, str]
    node: str
    saved: int = 0
    """Step of a checkpoint that was on disk in an earlier attempt."""

    @property
    def pulse(self) -> Path:
        return Path(self.directory) / "pulse"

    @property
    def stacks(self) -> Path:
        return Path(self.directory) / "stacks"


def main(channel: Channel, message: dict[str, Any]) -> None:
    """Carry a job out and end the process; what came of it is the last message."""
    job = Job(**message)
    os.environ.update(job.environment)
    _observable(job)
    orders = Orders(channel)
    code = 1
    try:
        outcome = _outcome(job, channel, orders)
        code = 0 if "failed" not in outcome else 1
        channel.send(outcome)
    finally:
        _flush_output()
        os._exit(code)  # libraries' farewells take seconds, and may hang where a peer is gone


def _observable(job: Job) -> None:
    """Write the pulse, and stacks when the process crashes or is asked for them by SIGUSR1.

    Asked for is the main thread's stack alone: walking those of threads that run may crash the process.
    """
    pulse.begin(job.pulse)
    stacks = open(job.stacks, "a")  # noqa: SIM115  open as long as the process lives
    faulthandler.enable(file=stacks)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's; it tells the ranks to save first


def _outcome(job: Job, channel: Channel, orders: Orders) -> dict[str, Any]:
    """Train; return what came of it in words that travel."""
    try:
        return {"done": _train(job, channel, orders)}
    except RaytxError as stop:  # what a user must mend; doing it again would only repeat it
        return {"stopped": str(stop), "at": time.time()}
    except BaseException as error:
        told = "".join(traceback.format_exception(error))
        return {"failed": f"{type(error).__name__}: {error}", "traceback": told, "at": time.time()}


def _train(job: Job, channel: Channel, orders: Orders) -> dict[str, Any]:
    plan = Plan.from_dict(job.plan)
    if plan.world_size != job.world_size:  # workers came or went
        plan = plan.on(job.world_size)
    meeting = rendezvous.meet(
        job.meeting_point,
        backend=job.backend,
        rank=job.rank,
        world_size=job.world_size,
        timeout_s=job.timeout_s,
        device=job.environment.get("RAYTX_DEVICE"),
    )
    with Writer(
        plan.run_dir if job.rank == 0 else None, tell=lambda record: channel.send({"record": record})
    ) as writer:
        session = worker.Session(
            rank=job.rank,
            log=writer.log,
            flush=writer.flush,
            report=lambda metrics: channel.send({"report": dict(metrics)}),
            node=job.node,
            order=orders.latest,
            saved=job.saved,
        )
        state = worker.train(plan, session)
    if job.rank == 0 and (mirrored := mirror.of(plan)):
        mirrored.leave(lambda text: channel.send({"record": {"kind": "remark", "text": text}}), mirror.JOURNAL)
    meeting.part()
    return {"step": state.step}


class Orders:
    """Hears what the keeper asks for, and ends the process when the keeper is gone."""

    def __init__(self, channel: Channel) -> None:
        self._channel, self._parent = channel, os.getppid()
        self._latest = Order()
        threading.Thread(target=self._listen, name="raytx-orders", daemon=True).start()

    def latest(self) -> Order:
        return self._latest

    def _listen(self) -> None:
        while True:
            try:
                self._latest = Order(**self._channel.receive(timeout_s=PARENT_EVERY_S))
            except TimeoutError:
                if os.getppid() != self._parent:
                    os._exit(1)
            except EOFError:
                os._exit(1)


class Writer:
    """Takes rank 0's records without blocking a step; a thread writes them to the journal and tells the keeper."""

    def __init__(self, run_dir: Path | None, *, tell: Callable[[Record], None]) -> None:
        self._run_dir, self._tell = run_dir, tell
        self._waiting: queue.Queue[Record | Future[None]] = queue.Queue(QUEUE_LIMIT)
        """Records, and who waits until those before are on disk."""
        self._problem: str | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._carry, name="raytx-log", daemon=True)

    def __enter__(self) -> Writer:
        if self._run_dir is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self._run_dir is not None:
            self._thread.join(timeout=LEAVE_S)

    def log(self, record: Record) -> None:
        """Take a record, or drop it where too many wait; but a row of the ledger is waited for, as it is a proof."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(record, block=record["kind"] == FED)

    def flush(self) -> None:
        """Return when what was logged so far is on disk. Raises OSError where it cannot be written, or not in time."""
        on_disk: Future[None] = Future()
        with contextlib.suppress(queue.Full):
            self._waiting.put(on_disk, timeout=FLUSH_LIMIT_S)
            wait([on_disk], timeout=FLUSH_LIMIT_S)
        if not on_disk.done():
            raise OSError(errno.ETIMEDOUT, f"metrics are not on disk after {FLUSH_LIMIT_S:g} s", str(self._run_dir))
        on_disk.result()

    def _carry(self) -> None:
        assert self._run_dir is not None
        with Journal(self._run_dir) as journal:
            while not (self._done.wait(FLUSH_S) and self._waiting.empty()):
                if given := [self._waiting.get_nowait() for _ in range(self._waiting.qsize())]:
                    self._deliver([one for one in given if not isinstance(one, Future)], journal)
                    _answer([one for one in given if isinstance(one, Future)], journal)

    def _deliver(self, records: list[Record], journal: Journal) -> None:
        """A journal that cannot be written must not stop a step; the next checkpoint is not made without it."""
        before, self._problem = self._problem, journal.take(records)
        if self._problem not in (None, before):
            records = [*records, {"kind": "remark", "text": f"metrics cannot be written: {self._problem}"}]
        for record in records:
            if record["kind"] != FED:  # which is for the file alone
                self._tell(record)


def _answer(asked: list[Future[None]], journal: Journal) -> None:
    """Tell those who wait for the journal when it is on disk, or why it is not."""
    for on_disk in asked:
        try:
            journal.sync()
            on_disk.set_result(None)
        except OSError as error:
            on_disk.set_exception(error)


def _flush_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


if __name__ == "__main__":
    with open(int(sys.argv[2]), "rb") as given:
        main(Channel(socket.socket(fileno=int(sys.argv[1]))), json.load(given))
