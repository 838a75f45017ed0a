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
from command import FIRST_S, Command, Home, assert_nothing_left, assert_same_tensors, swept

from raytx.supervision import SILENCE_S

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.long]
LONG = os.environ.get("RAYTX_CHAOS_LONG") == "1"
STOPS = 10 if LONG else 2
"""How often ranks are stopped, and then keepers."""
STEPS = 40 * (STOPS + 1)
STALL_S = 3.0
REPLACED_S = 30.0
"""From the limit to the next step, at most."""
NEW_WORKERS_S = 60.0
"""The same where Ray Train has to replace workers: it starts a dozen processes, which have to import Ray."""
PACE: dict[str, float] = {"step_s": 0.03}
SHORT: dict[str, Any] = {
    "train__steps": STEPS,
    "save__every": 10,
    "evaluate__every": 20,
    "scaling__stall_s": STALL_S,
}
SLOW_STALL_S = 2.0
SLOW = {
    "start_s": 3 * SLOW_STALL_S,
    "first_s": 3 * SLOW_STALL_S,
    "step_s": 0.3 * SLOW_STALL_S,
    "write_s": 2 * SLOW_STALL_S,
    "evaluation_s": 2 * SLOW_STALL_S,
}
"""A step has two passes, one in ten steps a longer one; a checkpoint has two files of each rank."""
SLOW_S = 600.0 if LONG else 30.0


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


def test_a_stopped_keeper_is_named_and_replaced_with_its_rank_which_trains_on_meanwhile(
    home: Home, unbroken: Command
) -> None:
    run = Command(home, home.recipe("keeper", model={"step_s": 0.15}, **SHORT)).start()
    for number in range(1, STOPS):
        run.reach(40 * number - 20)
        ranks, keeper = run.pids(), keepers(home)[number % 2]
        os.kill(keeper.pid, signal.SIGSTOP)
        run.until(lambda: len(run.journal("placed")) > number, SILENCE_S + NEW_WORKERS_S, "new ranks")  # noqa: B023
        assert "has not been heard of for" in run.output
        assert not [pid for pid in ranks if psutil.pid_exists(pid)], "a rank outlived its attempt"
        assert not keeper.is_running()
    assert run.wait() == 0, run.output[-3000:]
    assert run.steps == list(range(1, STEPS + 1))
    assert_same_tensors(run, unbroken)
    assert_nothing_left(home)


def slow(home: Home, name: str, **environment: str) -> Command:
    values = SHORT | {"train__steps": 100_000, "save__background": False, "evaluate__every": 10, "scaling__grace_s": 60}
    recipe = home.recipe(name, model=SLOW, **values | {"scaling__stall_s": SLOW_STALL_S})
    return Command(home, recipe, environment=environment).start()


def alarms(run: Command) -> list[str]:
    return [word for word in ("missing", "not been heard of", "starting anew") if word in run.output]


def test_what_is_slow_raises_no_alarm(home: Home) -> None:
    run = slow(home, "slow")
    run.reach(1)
    began = time.monotonic()
    run.until(lambda: time.monotonic() - began > SLOW_S and run.step > 11, SLOW_S + FIRST_S, "slow steps")
    assert max(row["seconds"] for row in run.journal("checkpoint")) > 3 * SLOW_STALL_S
    assert max(row["seconds"] for row in run.journal("eval")) > 2 * SLOW_STALL_S
    assert max(row["seconds"] for row in run.journal("step")[1:]) > SLOW_STALL_S
    run.tell(signal.SIGTERM)
    assert run.wait() == 143
    assert not alarms(run), run.output[-3000:]
    assert len(run.journal("placed")) == 1


def test_a_limit_that_knows_no_slow_phases_would_raise_one(home: Home) -> None:
    (home.directory / "planted").mkdir()
    planted = "from raytx import supervision\n\nsupervision.SLOW_LIMITS = 1\n"
    (home.directory / "planted" / "sitecustomize.py").write_text(planted)
    path = os.pathsep.join([str(home.directory / "planted"), home.environment["PYTHONPATH"]])
    run = slow(home, "planted", PYTHONPATH=path)
    run.until(lambda: alarms(run), what="a false alarm")
    run.tell(signal.SIGTERM)
    assert run.wait() == 143
