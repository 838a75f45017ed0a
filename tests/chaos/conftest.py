"""A home for runs that are killed, and the unbroken runs that they are compared with."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from job import Job


@pytest.fixture(scope="session")
def home() -> Iterator[Path]:
    """A directory with a short name: a Unix socket's path has at most 107 bytes."""
    directory = Path(tempfile.mkdtemp(prefix="rx"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def unbroken(home: Path) -> Callable[..., Job]:
    """Train a strategy's recipe once, undisturbed."""

    @functools.cache
    def trained(strategy: str, values: tuple[tuple[str, Any], ...]) -> Job:
        job = Job(home, f"unbroken-{strategy.replace(' ', '-')}-{len(values)}", strategy, dict(values))
        assert job.start().wait(timeout=400) == 0, job.tail()
        return job

    def train(strategy: str, values: Mapping[str, Any] | None = None) -> Job:
        return trained(strategy, tuple(sorted((values or {}).items())))

    return train
