"""What has stalled is named and replaced in time; what is only slow is left alone.

RAYTX_CHAOS_LONG=1 stops ranks ten times and is slow for ten minutes; without it, twice and for one.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import Command, Home, assert_nothing_left, assert_same_tensors, swept

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
LONG = os.environ.get("RAYTX_CHAOS_LONG") == "1"
STOPS = 10 if LONG else 2
"""How often ranks are stopped, and then keepers."""
STEPS = 40 * (STOPS + 1)
STALL_S = 3.0
REPLACED_S = 30.0
"""From the limit to the next step, at most."""
PACE: dict[str, float] = {"step_s": 0.03}
SHORT: dict[str, Any] = {
    "train__steps": STEPS,
    "save__every": 10,
    "evaluate__every": 20,
    "scaling__stall_s": STALL_S,
}
SLOW = {"start_s": 4 * STALL_S, "first_s": 4 * STALL_S, "write_s": 3.5 * STALL_S, "evaluation_s": 2 * STALL_S}
SLOW_S = 600.0 if LONG else 45.0


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    directory = Path(tempfile.mkdtemp(prefix="rx", dir="/tmp"))
    with swept(Home(directory)) as found:
        yield found
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def unbroken(home: Home) -> Command:
    run = Command(home, home.recipe("unbroken", model=PACE, **SHORT)).start()
    assert run.wait() == 0, run.output[-3000:]
    return run


def keepers(home: Home) -> list[psutil.Process]:
    return [process for process in home.processes() if "RayTrainWorker" in "".join(process.cmdline())]


def seconds_until_it_goes_on(run: Command, victim: int) -> float:
    """Stop a process, and return how long it is until the run has done a step beyond those it had done."""
    os.kill(victim, signal.SIGSTOP)
    stopped, before = time.monotonic(), run.step
    run.until(lambda: run.step > before + 3, what=f"a step after {before}")
    return time.monotonic() - stopped


def test_a_stopped_rank_is_named_and_replaced_in_time_and_its_keeper_likewise(home: Home, unbroken: Command) -> None:
    run = Command(home, home.recipe("stopped", model=PACE, **SHORT)).start()
    for number in range(1, STOPS + 1):
        run.reach(40 * number)
        rank = number % 2
        pid = run.pids()[rank]
        assert seconds_until_it_goes_on(run, pid) < STALL_S + REPLACED_S
        assert f"rank {rank} is missing" in run.output
        assert "its process is stopped" in run.output
        assert not psutil.pid_exists(pid)
    assert run.wait() == 0, run.output[-3000:]
    assert run.steps == list(range(1, STEPS + 1))
    assert_same_tensors(run, unbroken)
    assert_nothing_left(home)


def test_a_stopped_keeper_is_named_and_replaced_with_its_rank(home: Home, unbroken: Command) -> None:
    run = Command(home, home.recipe("keeper", model=PACE, **SHORT)).start()
    for number in range(1, STOPS + 1):
        run.reach(40 * number)
        ranks, keeper = run.pids(), keepers(home)[number % 2]
        assert seconds_until_it_goes_on(run, keeper.pid) < 10 + REPLACED_S
        assert "has not been heard of for" in run.output
        assert not [pid for pid in ranks if psutil.pid_exists(pid)], "a rank outlived its attempt"
        assert not keeper.is_running()
    assert run.wait() == 0, run.output[-3000:]
    assert run.steps == list(range(1, STEPS + 1))
    assert_same_tensors(run, unbroken)
    assert_nothing_left(home)


def test_what_is_slow_raises_no_alarm(home: Home) -> None:
    values = SHORT | {"train__steps": 100_000, "scaling__grace_s": 60, "save__background": False}
    run = Command(home, home.recipe("slow", model=SLOW | {"step_s": 0.6}, **values)).start()
    run.reach(1)
    began = time.monotonic()
    run.until(lambda: time.monotonic() - began > SLOW_S and run.step > 22, what="slow steps", seconds=SLOW_S + 300)
    assert run.journal("checkpoint")
    assert run.journal("eval")
    run.tell(signal.SIGTERM)
    assert run.wait() == 143
    assert "missing" not in run.output
    assert "starting anew" not in run.output
    assert len(run.journal("placed")) == 1
