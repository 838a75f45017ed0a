"""Ranks that meet part together: nobody leaves while another is still in its last collective."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raytx import rendezvous

RANK = """
import os, sys, time
import torch, torch.distributed as dist
from raytx import rendezvous

point, rank, pause_s, limit_s, dies = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
rendezvous.PART_S = limit_s
meeting = rendezvous.meet(point, backend="gloo", rank=rank, world_size=2, timeout_s=60)
total = torch.ones(3)
dist.all_reduce(total)
assert total.tolist() == [2.0] * 3
began = time.monotonic()
if rank == 1:
    time.sleep(pause_s)
    if dies == "dies":
        os._exit(0)
meeting.part()
print(time.monotonic() - began, dist.is_initialized(), flush=True)
os._exit(0)
"""


def parted(point: str, *, pause_s: float, limit_s: float = 30.0, dies: str = "") -> list[list[str]]:
    """Let two ranks meet and part, the second later by a pause; return what each said of it."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, point, str(rank), str(pause_s), str(limit_s), dies],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    return [out.split() for out, _ in said]


@pytest.fixture(params=["file", "tcp"])
def point(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return rendezvous.in_file(tmp_path / "made", "point")
    return rendezvous.at("127.0.0.1", rendezvous.free_port("127.0.0.1"))


def test_a_rank_waits_until_the_others_are_past_their_last_collective(point: str) -> None:
    (waited, initialized), (other, _) = parted(point, pause_s=2.0)
    assert float(waited) > 1.9
    assert float(other) < 5.0
    assert initialized == "False"


def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_the_limit(point: str) -> None:
    (waited, initialized), _ = parted(point, pause_s=0.0, limit_s=2.0, dies="dies")
    assert 1.5 < float(waited) < 20
    assert initialized == "False"
