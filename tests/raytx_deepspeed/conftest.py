"""Jobs on several ranks: all of one world size run in one process group, once a session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

RANK = Path(__file__).with_name("rank.py")
Jobs = Mapping[str, Mapping[str, Any]]


@pytest.fixture(scope="session")
def run_jobs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, Jobs], dict[str, Any]]:
    """Do named jobs one after the other on so many ranks; return what each found."""

    def run(world_size: int, jobs: Jobs) -> dict[str, Any]:
        directory = tmp_path_factory.mktemp("jobs")
        path = directory / "jobs.json"
        path.write_text(json.dumps(jobs))
        _launch(world_size, directory / uuid.uuid4().hex, path)
        return json.loads(path.with_suffix(".found").read_text())

    return run


def _launch(world_size: int, rendezvous: Path, jobs: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(RANK), str(rank), str(world_size), str(rendezvous), str(jobs)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [rank.communicate(timeout=400)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    codes = [rank.returncode for rank in ranks]
    assert codes == [0] * world_size, "\n".join(output[-3000:] for output in outputs)
