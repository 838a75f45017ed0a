"""The owner of a node's fork server: it has one that answers, and clears up behind those that were killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from raytx.channel import Channel
from raytx.nursery import Nursery


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This user's private directory, somewhere short."""
    with tempfile.TemporaryDirectory(prefix="rx") as base:
        monkeypatch.setenv("RAY_TMPDIR", base)
        private = Path(base) / f"raytx-{os.getuid()}"
        private.mkdir(mode=0o700)
        yield private


@contextlib.contextmanager
def nursery() -> Iterator[Any]:
    """Yield what the actor is made of, for a plan that says nothing."""
    made = Nursery.__ray_metadata__.modified_class({}, {})  # type: ignore[attr-defined]
    try:
        yield made
    finally:
        made._server.kill()
        made._server.wait()


def forked_at(address: str) -> int:
    """Ask for a rank; return its process id."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.connect(address)
        channel = Channel(connection)
        channel.send({})
        return int(channel.receive(timeout_s=20)["started"])


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        return process.pid


def test_a_fork_server_that_is_stopped_is_ended_and_another_takes_its_place(directory: Path) -> None:
    with nursery() as made:
        stopped = made._server.pid
        os.kill(stopped, signal.SIGSTOP)
        os.waitpid(stopped, os.WUNTRACED)
        assert forked_at(made.address()) > 0
        assert not psutil.pid_exists(stopped)


def test_a_fork_server_that_answers_stays(directory: Path) -> None:
    with nursery() as made:
        first = made._server.pid
        assert forked_at(made.address()) > 0
        assert made._server.pid == first


def test_what_killed_processes_have_left_is_removed_and_nobody_elses(directory: Path) -> None:
    dead, alive = dead_pid(), os.getppid()
    for name in (f"rank-{dead}-ab12", f"rank-{alive}-ab12", "ray"):
        (directory / name).mkdir()
        (directory / name / "pulse").touch()
    for name in (f"fork-{dead}", f"fork-{alive}", f"other-{dead}"):
        (directory / name).touch()
    with nursery():
        left = {path.name for path in directory.iterdir()}
    assert left == {f"rank-{alive}-ab12", f"fork-{alive}", f"fork-{os.getpid()}", f"other-{dead}", "ray"}
