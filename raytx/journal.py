"""The journal of a run: metrics.jsonl, TensorBoard events and ledger, written by rank 0; progress, by the driver."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from raytx.files import write_text

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

    It stands beside the checkpoints and is flushed before each, so that it is as whole as they are, whoever is killed.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path, self._ledger = run_dir / METRICS, run_dir / LEDGER
        self._events = _Events(run_dir / "tensorboard")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._events.close()

    def take(self, records: Iterable[Record]) -> str | None:
        """Write records; return why they could not be written, or None."""
        try:
            for record in records:
                self._write(record)
        except (OSError, TypeError, ValueError) as error:  # a full disk, or a plugin's metric that is no number
            return str(error)
        return None

    def _write(self, record: Record) -> None:
        if record["kind"] in FRESH:
            for path in (self._path, self._ledger):
                _cut(path, after=record["step"])
        line = json.dumps({**record, "time": round(time.time(), 3)}) + "\n"
        with open(self._ledger if record["kind"] == FED else self._path, "a", encoding="utf-8") as file:
            file.write(line)
        self._events.add(record)


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

    def add(self, record: Record) -> None:
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
            self._writer.close()
