"""The journal of a run: metrics.jsonl, TensorBoard events and ledger, written by rank 0; progress, by the driver."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from raytx.files import sync, sync_directory, write_text

METRICS = "metrics.jsonl"
LEDGER = "ledger.jsonl"
FED = "fed"
"""Kind of the records that go into the ledger; see ledger.py."""
PLAIN_EVERY_S = 5.0
"""Seconds between progress lines where the output is no terminal."""
SPEED_WINDOW = 20
FRESH = frozenset({"started", "resumed"})
"""Records that begin an attempt: rows of later steps will be written again."""

Record = Mapping[str, Any]


class Journal:
    """Writes records in order, one row a step: an attempt that resumes drops the rows of what it does again.

    It stands beside the checkpoints and is synchronised before each, so that it is as whole as they are, whoever is
    killed. Records that the disk does not take are kept and tried again, before later ones.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path, self._ledger = run_dir / METRICS, run_dir / LEDGER
        self._events = _Events(run_dir / "tensorboard")
        self._left: deque[Record] = deque()
        self._refusal: OSError | None = None
        """Why the disk does not take the first that is left."""

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._events.close()

    def take(self, records: Iterable[Record]) -> str | None:
        """Write records; return the first reason why one could not be written, or None."""
        self._left.extend(records)
        self._refusal, problem = None, None
        while self._left:
            try:
                self._write(self._left[0])
            except OSError as error:  # a full disk, say: all that is left waits, as rows are in order
                self._refusal = error
                return problem or str(error)
            except (TypeError, ValueError) as error:  # a plugin's metric that is no number
                problem = problem or str(error)
            told = self._events.add(self._left.popleft())
            problem = problem or told
        return problem

    def sync(self) -> None:
        """Wait until the disk has all that was taken. Raises OSError where it has not."""
        if self._refusal is not None:
            raise self._refusal
        for path in (self._path, self._ledger):
            if path.is_file():
                sync(path)
        sync_directory(self._path.parent)

    def _write(self, record: Record) -> None:
        if record["kind"] in FRESH:
            for path in (self._path, self._ledger):
                _cut(path, after=record["step"])
        line = json.dumps({**record, "time": round(time.time(), 3)}) + "\n"
        _append(self._ledger if record["kind"] == FED else self._path, line)


def _append(path: Path, line: str) -> None:
    """Add a line to a file, or nothing: the next one must not follow on half of it. Raises OSError."""
    size = path.stat().st_size if path.is_file() else 0
    try:
        with open(path, "ab") as file:
            file.write(line.encode())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise OSError(error.errno, error.strerror, str(path)) from error  # writing does not say where


def _cut(path: Path, *, after: int) -> None:
    """Drop the rows of later steps from a file, where it exists."""
    if path.is_file():
        kept = [line for line in rows(path) if line.get("step", 0) <= after]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


class Display:
    """Shows records to the user as they come."""

    def __init__(self, *, total_steps: int, console: Console) -> None:
        self._line = _Line(total_steps, console)
        self._console = console

    def __enter__(self) -> Display:
        self._line.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.stop()

    def show(self, record: Record) -> None:
        kind = record["kind"]
        if kind == "step":
            self._line.step(record)
        elif kind == "eval":
            numbers = "  ".join(f"{k} {v:.4f}" for k, v in record.items() if k not in {"kind", "step", "seconds"})
            self._say(f"step {record['step']:>6}  held-out: {numbers}")
        elif kind == "resumed":
            self._say(f"resumed from checkpoint {record['checkpoint']} (step {record['step']})")
        elif kind == "checkpoint":
            self._say(f"step {record['step']:>6}  checkpoint {record['name']} committed")
        elif kind == "remark":
            self._say(record["text"], style="yellow")

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, highlight=False, markup=False)


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file; a last line cut short by a kill is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


class _Line:
    """The progress line: a live bar in a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, total: int, console: Console) -> None:
        self._console, self._total = console, total
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            _Eta(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("train", total=total, numbers="waiting for workers", eta="")
        self._seconds: list[float] = []
        self._last = 0.0

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def step(self, record: Record) -> None:
        self._seconds = [*self._seconds[1 - SPEED_WINDOW :], record["seconds"]]
        each = sorted(self._seconds)[len(self._seconds) // 2]
        eta = _clock(each * (self._total - record["step"]))
        numbers = f"loss {record['loss']:.4f}  {record['tokens_per_s']:,.0f} tokens/s  lr {record['lr']:.1e}"
        self._progress.update(self._task, completed=record["step"], numbers=numbers, eta=eta)
        due = time.monotonic() - self._last >= PLAIN_EVERY_S or record["step"] == self._total
        if not self._console.is_terminal and due:
            self._last = time.monotonic()
            self._console.print(f"step {record['step']:>6}/{self._total}  {numbers}  ETA {eta}", highlight=False)


class _Eta(ProgressColumn):
    def render(self, task: Any) -> Text:
        return Text(f"ETA {task.fields['eta']}" if task.fields["eta"] else "")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Events:
    """TensorBoard scalars, written without TensorFlow or torch; the writer makes its directory at the first record."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None

    def add(self, record: Record) -> str | None:
        """Write a record's numbers; return why they could not be written, or None."""
        try:
            self._add(record)
        except Exception as error:
            self._writer = None  # its thread has ended, and it would raise this for ever
            return f"TensorBoard: {error}"
        return None

    def _add(self, record: Record) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if record["kind"] not in {"step", "eval", *FRESH}:
            return
        if self._writer is None:
            self._writer = EventFileWriter(str(self._directory))
        if record["kind"] in FRESH:  # TensorBoard then drops what earlier attempts wrote of later steps
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=record["step"] + 1, session_log=start))
            return
        prefix = "train" if record["kind"] == "step" else "eval"
        values = [
            Summary.Value(tag=f"{prefix}/{key}", simple_value=value)
            for key, value in record.items()
            if isinstance(value, float) and math.isfinite(value)
        ]
        self._writer.add_event(Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values)))

    def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(Exception):
                self._writer.close()
