"""A run that is told to end does so within its grace, whatever it is doing, with a checkpoint of its last step.

RAYTX_CHAOS_LONG=1 tells it by SIGTERM and by Ctrl-C in each phase; without it, by one of them in each.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from command import Command, Home, assert_nothing_left, eventually, memory_left, swept
from ray.job_submission import JobStatus, JobSubmissionClient

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.long]
LONG = os.environ.get("RAYTX_CHAOS_LONG") == "1"
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
GRACE_S = 20.0
TAKEN_DOWN_S = 12.0
"""For Ray Train to end a group that is done, and for a local cluster to end, on a busy machine."""
AT_ONCE_S = 10.0


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    directory = Path(tempfile.mkdtemp(prefix="rx", dir="/tmp"))
    with swept(Home(directory)) as found:
        yield found
    shutil.rmtree(directory, ignore_errors=True)


@dataclass(frozen=True)
class Phase:
    """How a run is brought into a phase, and what it must have saved when it was told to end there."""

    reach: Callable[[Command], Any]
    model: dict[str, float] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    saves: bool = True
    """Whether there is anything to save: the step that was the last then."""


def noted(name: str) -> Callable[[Command], Any]:
    return lambda run: run.until(lambda: (run.notes / name).exists(), what=name)


def killed(run: Command) -> None:
    """Have a rank killed, and wait until the run has noticed."""
    run.reach(12)
    os.kill(run.pids()[1], signal.SIGKILL)
    run.until(lambda: "rank 1 was ended by SIGKILL" in run.output, what="a restart")


PHASES = {
    "start-up": Phase(noted("start"), {"start_s": 60.0}, saves=False),
    "first step": Phase(noted("first"), {"first_s": 5}),
    "step": Phase(lambda run: run.reach(5), {"step_s": 0.05}),
    "evaluation": Phase(noted("evaluation"), {"evaluation_s": 3}, {"evaluate__every": 5}),
    "save": Phase(noted("write"), {"write_s": 3, "step_s": 0.05}, {"save__every": 5}),
    "restart": Phase(killed, {"step_s": 0.05}, {"save__every": 10}, saves=False),
}
BOTH = [(phase, number) for phase in PHASES for number in CODES]
ONE_EACH = list(zip(PHASES, (signal.SIGTERM, signal.SIGINT) * len(PHASES), strict=False))


@pytest.mark.parametrize(
    ("name", "number"), BOTH if LONG else ONE_EACH, ids=lambda value: getattr(value, "name", value)
)
def test_a_run_that_is_told_to_end_has_saved_its_last_step_within_its_grace(
    home: Home, name: str, number: signal.Signals
) -> None:
    phase = PHASES[name]
    before = memory_left()
    values = {"train__steps": 5000, "scaling__grace_s": GRACE_S} | phase.values
    run = Command(home, home.recipe(f"{name.replace(' ', '-')}-{number.name}", model=phase.model, **values)).start()
    phase.reach(run)
    told = run.tell(number)
    assert run.wait() == CODES[number], run.output[-3000:]
    assert time.monotonic() - told < GRACE_S + TAKEN_DOWN_S
    assert "Traceback" not in run.output
    assert "starting anew" not in run.output.partition("saving a checkpoint, then stopping")[2]
    assert "goes on from there" in run.output
    if phase.saves:
        assert run.saved() == run.step > 0
        assert f"at step {run.step}, with a checkpoint of it" in run.output
    else:
        assert "with nothing saved since the last checkpoint" in run.output
    assert_nothing_left(home)
    assert not memory_left() - before


def test_a_run_that_exports_when_it_is_told_to_end_has_nothing_more_to_save(home: Home) -> None:
    exports = [{"type": "slow-export", "notes": str(home.directory / "notes" / "export")}]
    run = Command(home, home.recipe("export", train__steps=4, export=exports)).start()
    noted("export")(run)
    told = run.tell(signal.SIGTERM)
    assert run.wait() == 143, run.output[-3000:]
    assert time.monotonic() - told < AT_ONCE_S
    assert run.saved() == run.step == 4
    assert "Traceback" not in run.output
    assert "the same command goes on from the last checkpoint" in run.output
    assert_nothing_left(home)


def test_a_second_ctrl_c_ends_a_run_at_once_and_leaves_its_last_checkpoint(home: Home) -> None:
    values = {"train__steps": 5000, "save__every": 5, "scaling__grace_s": 300}
    run = Command(home, home.recipe("twice", model={"write_s": 0.5, "step_s": 2.0}, **values)).start()
    run.reach(8)
    run.tell(signal.SIGINT)
    run.until(lambda: "Ctrl-C once more stops at once" in run.output, what="the first one's answer")
    told = run.tell(signal.SIGINT)
    assert run.wait() == 130, run.output[-3000:]
    assert time.monotonic() - told < AT_ONCE_S
    assert run.saved() == 5
    assert "Traceback" not in run.output
    assert_nothing_left(home)


HEAD = """
import ray, sys
from raytx import cluster

cluster.connect(num_cpus=2, dashboard=True)
node = ray._private.worker._global_node  # jobs look here for their cluster, and else take any of this machine's
ray._private.utils.write_ray_address(node.gcs_address, node.get_temp_dir_path())
for line in sys.stdin:
    states = [group["state"] for group in ray.util.placement_group_table().values()]
    print("answer", f"http://{node.webui_url}", sum(state != "REMOVED" for state in states), len(states), flush=True)
"""


@pytest.fixture
def head(home: Home) -> Iterator[Callable[[], str]]:
    """Start a cluster with a job server; return what it answers: its address, placement groups left and ever made."""
    program = [sys.executable, "-c", HEAD]
    pipe = subprocess.PIPE
    with subprocess.Popen(program, env=home.environment, stdin=pipe, stdout=pipe, text=True) as process:

        def answer() -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            return next(line.split(" ", 1)[1].strip() for line in process.stdout if line.startswith("answer"))

        yield answer
        process.kill()


def test_a_job_that_is_stopped_saves_its_last_step_and_frees_what_it_held(home: Home, head: Callable[[], str]) -> None:
    values = {"train__steps": 5000, "scaling__grace_s": GRACE_S}
    run = Command(home, home.recipe("job", model={"step_s": 0.2}, **values))
    client = JobSubmissionClient(address := head().split()[0])
    job = run.submit(address)
    run.reach(5)
    client.stop_job(job)
    eventually(lambda: client.get_job_status(job) == JobStatus.STOPPED, GRACE_S + TAKEN_DOWN_S, "the job's end")
    assert run.saved() == run.step > 0
    assert f"stopped by SIGTERM at step {run.step}, with a checkpoint of it" in client.get_job_logs(job)
    eventually(lambda: not working(home), 30, "its processes' end")
    assert re.fullmatch(r"\S+ 0 [1-9]\d*", head())


def working(home: Home) -> list[str]:
    """Return the processes that train, or keep those that do."""
    commands = [" ".join(process.cmdline()) for process in home.processes()]
    return [text for text in commands if re.search(r"raytx (train|submit)|raytx.forkserver|RayTrain|TrainContr", text)]
