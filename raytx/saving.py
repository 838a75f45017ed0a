"""Saves under way: each rank writes its share while training goes on, and all commit it together or not at all."""

from __future__ import annotations

import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np

from raytx import checkpoint, mirror, pulse
from raytx.artifact import Golden
from raytx.checkpoint import Content, Demo, Files, State
from raytx.components import Engine, TensorHeader
from raytx.errors import CheckpointError, TrainingError
from raytx.files import SPELLED, sync_directory, write_safetensors
from raytx.mirror import Mirror, Saved
from raytx.plan import Plan
from raytx.storage import PAUSES_S

SHARD_BYTES = 1 << 30
"""A rank starts a new file when the tensors it holds reach this size, which bounds what is written again on failure
and, where nothing is written in the background, the extra memory."""
POLL_S = 0.02
NOTICEABLE_S = 1.0
"""Seconds of waiting for the save before, from which on the user is told."""
LINGER_S = 30.0
"""Seconds to wait for a thread that is still writing what has been given up."""

Phase = Literal["idle", "writing", "written", "sealing", "sealed", "failed"]


class Status(NamedTuple):
    """Where a rank is in the save under way; what the others must know of it."""

    phase: Phase = "idle"
    files: Files = {}
    """What it has written, once all of it is on disk."""
    error: str | None = None
    """Why it cannot."""
    bytes: int = 0
    """How much it has written so far."""
    retried: tuple[str, ...] = ()
    """What went wrong and was tried again."""


class Saver:
    """One rank's part in saving. At most one save is under way.

    Threads write, and only they touch the storage. Ranks agree on the main thread, in `council`, which the loop calls
    on every rank with the statuses of all; so a save begins, is committed or is given up at the same step everywhere.
    """

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        *,
        rank: int,
        promised: Mapping[str, TensorHeader],
        log: Callable[[dict[str, Any]], None],
        flush: Callable[[], None],
    ) -> None:
        """Make the run's directory where it is missing. Collective.

        `promised` is what every checkpoint must hold. `log` and `flush` are the session's; a thread calls `flush`.
        """
        self._engine, self._plan, self._rank = engine, plan, rank
        self._promised, self._log, self._flush = promised, log, flush
        self._mirror = mirror.of(plan)
        self._save: _Save | None = None
        self._told = False
        if rank == 0:
            checkpoint.make_room(plan.run_dir)
        # A name of this attempt's own: a rank of one that was given up may still be writing.
        last = self._mirror.greatest_attempt(rank=rank, gather=engine.gather) if self._mirror else 0
        # Greater than those of all earlier attempts, whatever the clocks of their machines say.
        self._attempt: int = engine.gather(max(time.time_ns(), last + 1))[0]
        self._saves = 0

    @property
    def under_way(self) -> bool:
        """Whether council has something to decide; the same on every rank."""
        return self._save is not None

    def begin(self, state: State, *, golden: Golden, demo: Demo, since: float | None = None) -> None:
        """Start to save, once the save before is committed; with save.background false, return when it is. Collective.

        `since` is when training stopped for it, by time.monotonic(). Raises TrainingError on every rank when this one
        or the one before cannot be saved.
        """
        since = since or time.monotonic()
        self._finish_earlier(state)
        target = checkpoint.directory_of(self._plan.run_dir, state.step)
        self._saves += 1  # a step may be saved twice: an order broke into its evaluation
        staging = target.with_name(f".{target.name}.{self._attempt:016x}{self._saves:06x}.{checkpoint.STAGING}")
        save = self._save = _Save(staging, target, Content(self._plan, state, golden, demo), since, self._mirror)
        tensors = _copied(self._engine)
        if self._plan.recipe.save.background:
            held = deque(tensors)  # here and now: the engine's iteration is collective
            save.run(lambda: self._write(save, _consumed(held)))
            save.stall_s = time.monotonic() - since
        else:
            self._write(save, tensors)
            self.wait()

    def status(self) -> Status:
        """Return what this rank has to tell the council."""
        return self._save.status._replace(bytes=self._save.bytes) if self._save else Status()

    def council(self, statuses: Sequence[Status]) -> None:
        """Take the next step that all ranks' statuses, in rank order, allow; a save that is sealed is over. Collective.

        Raises TrainingError, on every rank, when any of them cannot write or a tensor is not what the model has: what
        is half written is removed and earlier checkpoints stay.
        """
        if (save := self._save) is None:
            return
        if errors := [f"rank {rank}: {status.error}" for rank, status in enumerate(statuses) if status.error]:
            self._give_up(save, "; ".join(errors))
        if all(status.phase == "written" for status in statuses):
            self._seal(save, statuses)
        elif statuses[0].phase == "sealed":
            self._save = None
            if self._mirror:
                mirror.keep_local(save.staging, save.target)
            self._tell(save, statuses)

    def wait(self) -> None:
        """Return when no save is under way. Collective; raises what `council` raises."""
        before: list[Status] = []
        while self.under_way:
            statuses = self._engine.gather(self.status())
            if statuses != before:
                pulse.phase("checkpoint")  # slow is not stuck
            before = statuses
            self.council(statuses)
            if self.under_way:
                time.sleep(POLL_S)

    # ---- on the main thread

    def _finish_earlier(self, state: State) -> None:
        if (earlier := self._save) is None:
            return
        started = time.monotonic()
        self.wait()
        waited = time.monotonic() - started
        if waited > NOTICEABLE_S and not self._told and self._rank == 0:
            self._told = True
            self._remark(
                f"step {state.step}: training waited {waited:.1f} s until checkpoint {earlier.target.name} was "
                "written. The storage is slower than saves follow each other: raise save.every"
            )

    def _seal(self, save: _Save, statuses: Sequence[Status]) -> None:
        """Let rank 0 commit what all have written, unless it is not what the model has."""
        written = [status.files for status in statuses]
        if wrong := checkpoint.broken_promises(written, self._promised):
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            self._give_up(save, f"the strategy did not hand over what the model has: {'; '.join(wrong[:5])}{more}")
        save.status = Status("sealing", retried=save.status.retried)
        if self._rank == 0:
            files: Files = {name: entry for of_rank in written for name, entry in of_rank.items()}
            save.run(lambda: self._commit(save, files))

    def _give_up(self, save: _Save, why: str) -> NoReturn:
        """Let every rank stop writing, remove what is there and stop the run."""
        pulse.phase("checkpoint")  # storage that does not answer is waited for
        save.stop()
        self._engine.gather(None)  # nobody writes any more
        if self._rank == 0:
            shutil.rmtree(save.staging, ignore_errors=True)
        self._save = None
        raise TrainingError(
            f"could not save {save.target}: {why}. Mend that and run the same command again: it goes on from the last "
            "complete checkpoint"
        )

    def _tell(self, save: _Save, statuses: Sequence[Status]) -> None:
        if self._rank != 0:
            return
        step, name, seconds = save.content.state.step, save.target.name, time.monotonic() - save.since
        stall_s = seconds if save.stall_s is None else save.stall_s
        for text in (f"rank {rank}: {told}" for rank, status in enumerate(statuses) for told in status.retried):
            self._remark(f"step {step}: a write of checkpoint {name} failed and was tried again ({text})")
        self._log({"kind": "checkpoint", "step": step, "name": name, "seconds": seconds, "stall_s": stall_s})

    def _remark(self, text: str) -> None:
        self._log({"kind": "remark", "text": text})

    # ---- on a thread, except that what is not saved in the background is written on the main one

    def _write(self, save: _Save, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
        """Write this rank's tensors.

        The engine's iteration is collective, so it goes on to its end after an error in writing.
        """
        files = _ShareOfFiles(save, self._rank)
        error: str | None = None
        if self._mirror:
            mirror.tidy(self._plan.run_dir)
        for key, array in tensors:
            error = error or _attempted(lambda: files.add(key, array))  # noqa: B023  called at once
        error = error or _attempted(files.close)
        phase: Phase = "failed" if error else "written"
        save.status = Status(phase, {} if error else files.written, error, retried=tuple(save.retried))

    def _commit(self, save: _Save, files: Files) -> None:
        """Make the checkpoint complete and remove those that need not stay. Rank 0 only."""
        kept = {"num_to_keep": self._plan.recipe.save.num_to_keep, "best_step": save.content.state.best_step}
        saved = save.saved
        error = _attempted(lambda: save.persist(self._flush))
        error = error or _attempted(lambda: save.persist(lambda: save.seal(files)))
        if error is None:  # what cannot be removed now can be the next time
            if (mirrored := self._mirror) is not None:
                _attempted(lambda: mirrored.retain(saved, **kept))
            _attempted(lambda: checkpoint.retain(self._plan.run_dir, step=saved.step, attempt=saved.attempt, **kept))
        save.status = Status("failed" if error else "sealed", error=error, retried=tuple(save.retried))


@dataclass
class _Save:
    """One save under way, as one rank sees it."""

    staging: Path
    target: Path
    content: Content
    since: float
    mirror: Mirror | None
    status: Status = field(default_factory=lambda: Status("writing"))
    """Replaced as a whole, by a thread or between threads; so it is always of one moment."""
    bytes: int = 0
    stall_s: float | None = None
    """Seconds that the training stood still for it; None where it does so to the end."""
    retried: list[str] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def run(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=work, name="raytx-save", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Try nothing again, and wait until the thread has ended; but not for storage that does not answer."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(LINGER_S)

    @property
    def saved(self) -> Saved:
        """What it is in a store."""
        attempt = self.staging.name.removeprefix(f".{self.target.name}.").removesuffix(f".{checkpoint.STAGING}")
        return Saved(self.content.state.step, attempt)

    def share(self, path: Path) -> None:
        """Put a file that is on this node's disk where all nodes see it. Raises OSError."""
        if self.mirror:
            self.mirror.put(path, self.saved, advance=self.advance)

    def seal(self, files: Files) -> None:
        """Make it a checkpoint, as every rank has written its files. Raises OSError or CheckpointError."""
        if self.mirror is None:
            return checkpoint.seal(self.staging, self.target, files=files, content=self.content)
        checkpoint.finish(self.staging, files=files, content=self.content)
        self.mirror.commit(self.staging, self.saved, files)
        mirror.keep_local(self.staging, self.target)

    def advance(self, size: int) -> None:
        self.bytes += size

    def persist(self, write: Callable[[], None]) -> None:
        """Write, and try again with growing pauses where the storage fails."""
        for pause in PAUSES_S:
            try:
                return write()
            except OSError as error:
                self.retried.append(_told(error))
                if self.pause(pause):
                    raise
        write()

    def pause(self, seconds: float) -> bool:
        """Wait; return whether the save is given up meanwhile."""
        return self._stopping.wait(seconds)


class _ShareOfFiles:
    """The files of one rank, filled tensor by tensor; what is handed over is no longer anybody else's."""

    def __init__(self, save: _Save, rank: int) -> None:
        self._save, self._rank = save, rank
        self._held: dict[str, dict[str, np.ndarray]] = {"weights": {}, "optimizer": {}}
        self._bytes = dict.fromkeys(self._held, 0)
        self._counts = dict.fromkeys(self._held, 0)
        self.written: Files = {}

    def add(self, key: str, array: np.ndarray) -> None:
        stem = "optimizer" if "|" in key else "weights"
        held = self._held[stem]
        if key in held:
            raise CheckpointError(f"the strategy handed over {key} twice")
        held[key] = array
        self._bytes[stem] += array.nbytes
        if self._bytes[stem] >= SHARD_BYTES:
            self._flush(stem)

    def close(self) -> None:
        for stem in self._held:
            self._flush(stem)
        if self.written:
            self._save.persist(lambda: sync_directory(self._save.staging))

    def _flush(self, stem: str) -> None:
        if not (arrays := self._held[stem]):
            return
        name = f"{stem}-{self._rank:05d}-{self._counts[stem]:05d}.safetensors"
        self._save.persist(lambda: self._put(name, arrays))
        self._save.persist(lambda: self._save.share(self._save.staging / name))
        self._held[stem], self._bytes[stem] = {}, 0
        self._counts[stem] += 1

    def _put(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """The run's directory is not made: where it is gone, so is the disk it was on."""
        staging = self._save.staging
        staging.parent.mkdir(exist_ok=True)
        staging.mkdir(exist_ok=True)
        headers = {key: TensorHeader(SPELLED[array.dtype.name], array.shape) for key, array in arrays.items()}
        told = write_safetensors(staging / name, arrays, advance=self._save.advance)
        self.written[name] = told | {"tensors": {key: checkpoint.spelled(header) for key, header in headers.items()}}


def _copied(engine: Engine) -> Iterator[tuple[str, np.ndarray]]:
    """Yield this rank's share of the engine's tensors, copied, as the engine goes on to change its own. Collective."""
    for name, part, array in engine.tensors():
        if array is not None:
            yield checkpoint.key(name, part), np.array(array, order="C", copy=True)


def _consumed(tensors: deque[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each and let go of it, so that memory becomes free as files are written."""
    while tensors:
        yield tensors.popleft()


def _attempted(action: Callable[[], None]) -> str | None:
    """Do it and return None, or return what went wrong in words."""
    try:
        action()
    except Exception as error:  # whatever it is, the other ranks must hear of it
        return _told(error)
    return None


def _told(error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    return f"{type(error).__name__}: {error}"
