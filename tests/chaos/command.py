"""A raytx command that runs in processes of its own, as a user starts it, and what can be seen of it from outside."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from raytx import checkpoint
from raytx.checkpoint import Checkpoint
from raytx.journal import rows
from raytx.testing import tiny_model, tiny_rows

MARK = "RAYTX_TEST_MARK"
"""Variable by whose value all processes of a home are known, whoever their parents are by then."""
PLUGIN = Path(__file__).with_name("raytx_slow.py")
FIRST_S = 240.0
"""How long anything may take that this machine is only slow at."""


@dataclass(frozen=True)
class Home:
    """A directory of its own for runs, data and Ray; its path is short, as a Unix socket's has at most 107 bytes."""

    directory: Path

    def __post_init__(self) -> None:
        (self.directory / "texts").mkdir()
        for number, row in enumerate(tiny_rows()):
            (self.directory / "texts" / f"{number:03}.txt").write_text(row["text"])
        metadata = self.directory / "plugins" / "raytx_slow-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: raytx-slow\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text("[raytx]\nraytx_slow = raytx_slow\n")
        (metadata.parent / PLUGIN.name).write_text(PLUGIN.read_text())

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(self.directory / "plugins"), os.environ.get("PYTHONPATH", "")])
        mine = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "GLOO_"))}
        ray = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(self.directory)}
        return mine | ray | {MARK: str(self.directory), "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

    def recipe(self, name: str, *, model: Mapping[str, Any] | None = None, **values: Any) -> dict[str, Any]:
        """Make a tiny recipe of two ranks; `model` has times of the slow decoder, `values` replace dotted keys."""
        notes = self.directory / "notes" / name
        notes.mkdir(parents=True, exist_ok=True)
        plain: dict[str, Any] = {
            "name": name,
            "storage_path": str(self.directory / "runs"),
            "model": tiny_model() | {"type": "slow", "notes": str(notes)} | (model or {}),
            "data": {"type": "text-files", "path": str(self.directory / "texts"), "split": {"test": 0.3}},
            "strategy": {"type": "ddp"},
            "optim": {"lr": 2e-3},
            "train": {"steps": 30, "global_batch_size": 8, "micro_batch_size": 2, "max_length": 32, "ledger": True},
            "scaling": {"num_workers": 2, "max_failures": 100},
        }
        for key, value in values.items():
            *sections, last = key.split("__")
            place: dict[str, Any] = plain
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
        return plain

    def processes(self) -> list[psutil.Process]:
        """Return what lives, or waits to be reaped, of all that was started here."""
        return [process for process in psutil.process_iter() if _marked(process, str(self.directory))]

    def sweep(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()


def _marked(process: psutil.Process, mark: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.environ().get(MARK) == mark
    return False


@dataclass
class Command:
    """`raytx train` with a recipe, once or again."""

    home: Home
    recipe: Mapping[str, Any]
    prefix: Sequence[str] = ()
    """What comes before the command, to enter a namespace."""
    address: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def run_dir(self) -> Path:
        return self.home.directory / "runs" / self.recipe["name"]

    @property
    def notes(self) -> Path:
        return self.home.directory / "notes" / self.recipe["name"]

    @property
    def output(self) -> str:
        return re.sub(r"\s*\n\s*", " ", self._file.read_text(errors="replace")) if self._file.is_file() else ""

    @property
    def _file(self) -> Path:
        return self.home.directory / f"{self.recipe['name']}.out"

    def start(self) -> Command:
        path = self.home.directory / f"{self.recipe['name']}.yaml"
        path.write_text(yaml.safe_dump(dict(self.recipe)))
        at = ["--address", self.address] if self.address else []
        with open(self._file, "ab") as output:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "raytx", "train", str(path), *at],
                env=self.home.environment | dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def submit(self, address: str) -> str:
        """Send the recipe to a job server and return the job's name; the command follows its log."""
        project = self.home.directory / "project"
        project.mkdir()
        (project / "recipe.yaml").write_text(yaml.safe_dump(dict(self.recipe)))
        with open(self._file, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "raytx", "submit", "recipe.yaml", "--address", address],
                cwd=project,
                env=self.home.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        found = self.until(lambda: re.search(r"job (\S+): ", self.output), what="the job's name")
        return str(found[1])

    def tell(self, number: signal.Signals) -> float:
        """Send a signal to every process of the command's group, as a terminal does; return when."""
        assert self.process is not None
        os.killpg(self.process.pid, number)
        return time.monotonic()

    def wait(self, seconds: float = 2 * FIRST_S) -> int:
        """Return the exit code."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {seconds:g} s: {self.output[-3000:]}") from None

    def until(self, condition: Callable[[], Any], seconds: float = FIRST_S, what: str = "") -> Any:
        """Return the first true value of a condition, which must come while the command runs."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert self.process is not None
            assert self.process.poll() is None, f"ended before {what} with {self.process.poll()}: {self.output[-3000:]}"
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}. {self.output[-3000:]}"
            time.sleep(0.05)
        return found

    def reach(self, step: int) -> None:
        self.until(lambda: self.step >= step, what=f"step {step}")

    # ---- what it has written

    def journal(self, kind: str) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        return [row for row in (rows(path) if path.is_file() else []) if row["kind"] == kind]

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.journal("step")]

    @property
    def step(self) -> int:
        return max(self.steps, default=0)

    @property
    def losses(self) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in self.journal("step")}

    def pids(self) -> list[int]:
        """Return the rank processes of the last attempt, in rank order."""
        return list(self.journal("placed")[-1]["pids"])

    def saved(self) -> int:
        """Return the step of the newest checkpoint, every byte of which is sound; 0 where there is none."""
        found = checkpoint.complete(self.run_dir)
        if not found:
            return 0
        newest = max(found, key=lambda path: Checkpoint(path).step)
        assert checkpoint.damage(newest) is None
        return Checkpoint(newest).step

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the newest checkpoint's weights and moments."""
        found = checkpoint.newest(self.run_dir)
        assert found is not None
        found._open()
        return {key: file.get_tensor(key) for key, file in found._places.items()}


def eventually(condition: Callable[[], Any], seconds: float, what: str) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)


def assert_same_tensors(some: Command, other: Command) -> None:
    ours, theirs = some.tensors(), other.tensors()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key], err_msg=key)


def assert_nothing_left(home: Home, seconds: float = 30.0) -> None:
    """No process of a home lives or waits to be reaped."""
    deadline = time.monotonic() + seconds
    while (left := home.processes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, [_described(process) for process in left]


def _described(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{process.pid} {process.status()} {' '.join(process.cmdline())[:120]}"
    return f"{process.pid} gone"


def memory_left() -> set[str]:
    """Return the names in /dev/shm that no process maps or holds open: memory that nobody will ever give back."""
    names = {str(path) for path in Path("/dev/shm").glob("*")}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            names -= {line.rpartition(" ")[2] for line in (process / "maps").read_text().splitlines()}
            names -= {os.readlink(handle) for handle in (process / "fd").iterdir()}
    return names


@contextlib.contextmanager
def swept(home: Home) -> Iterator[Home]:
    """End what is left of a home when the block ends."""
    try:
        yield home
    finally:
        home.sweep()
