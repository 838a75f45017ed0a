"""Nodes are killed, drained, cut off and added while a run is on them: it goes on, and learns the same."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from command import Command, Home, swept
from machines import Machine, start_ray, two_machines

from raytx.ledger import audit

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.long]
LIMIT = 1e-4
"""Relative, of the losses of a run that lost nodes to those of unbroken ones."""
STORE = 80 * 2**20
"""Bytes of each node's object store: the least that Ray takes."""
NODES = 4
LEAN = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_prestart_worker_first_driver": "0",
}
LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what keeps Ray on loopback, see raytx/ray_internals.py
    "GLOO_SOCKET_IFNAME": "lo",
}
STEPS = 140
PACE = {"step_s": 0.1}
"""A pass of each of four ranks, two of each of two: a step of a tenth of a second, or two."""
LONG_RUN = {"train__steps": STEPS, "save__every": 10, "scaling__stall_s": 10}
WAIT_S = 25.0


@dataclass
class Cluster:
    """A cluster that another process holds."""

    home: Home
    holder: subprocess.Popen[str]
    environment: Mapping[str, str]
    address: str = field(init=False)

    def __post_init__(self) -> None:
        self.address = self.tell("address")

    def tell(self, order: str) -> str:
        """Have the holder do something; return its answer."""
        assert self.holder.stdin is not None
        assert self.holder.stdout is not None
        self.holder.stdin.write(f"{order}\n")
        self.holder.stdin.flush()
        for line in self.holder.stdout:
            word, _, answer = line.strip().partition(" ")
            if word == "answer":
                return answer
        raise AssertionError(f"no cluster any more: its process ended with {self.holder.wait()}")

    def train(self, name: str, **values: object) -> Command:
        recipe = self.home.recipe(name, model=PACE, **LONG_RUN | values)
        return Command(self.home, recipe, address=self.address, environment=self.environment).start()


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    directory = Path(tempfile.mkdtemp(prefix="rx", dir="/tmp"))
    with swept(Home(directory)) as found:
        yield found
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def nodes(home: Home) -> Iterator[Cluster]:
    """Four one-CPU nodes on loopback, and a head for the driver."""
    environment = home.environment | LEAN | LOOPBACK
    program = [sys.executable, str(Path(__file__).with_name("cluster_holder.py")), str(NODES), str(STORE)]
    pipe = subprocess.PIPE
    with subprocess.Popen(program, env=environment, stdin=pipe, stdout=pipe, text=True) as holder:
        cluster = Cluster(home, holder, environment)
        yield cluster
        with contextlib.suppress(OSError):
            cluster.tell("end")
        holder.kill()


@pytest.fixture(scope="module")
def one(home: Home) -> Command:
    """The same run in one process, on a Ray of its own, without sleep."""
    values = LONG_RUN | {"scaling__num_workers": 1, "strategy__type": "single"}
    run = Command(home, home.recipe("one", **values)).start()
    assert run.wait() == 0, run.output[-3000:]
    return run


def assert_same_curve(run: Command, other: Command) -> None:
    assert run.steps == list(range(1, STEPS + 1))
    for step, loss in other.losses.items():
        assert run.losses[step] == pytest.approx(loss, rel=LIMIT), f"step {step}"


def sizes(run: Command) -> list[int]:
    """Return the number of ranks of each attempt."""
    return [len(row["pids"]) for row in run.journal("placed")]


def saved_at_least(run: Command, step: int) -> bool:
    return any(row["step"] >= step for row in run.journal("checkpoint"))


def until_size(run: Command, size: int, seconds: float) -> float:
    """Wait until a run goes on with so many ranks; return how long that took."""
    began, before = time.monotonic(), run.step
    run.until(lambda: sizes(run)[-1] == size and run.step > before, seconds, f"{size} ranks, had {sizes(run)}")
    return time.monotonic() - began


def test_a_run_goes_on_with_two_nodes_of_four_and_with_four_again_and_leaves_one_that_is_drained(
    nodes: Cluster, one: Command
) -> None:
    whole = nodes.train("whole", scaling__num_workers=4)
    assert whole.wait() == 0, whole.output[-3000:]
    run = nodes.train("elastic", scaling__num_workers=[2, 4])
    run.reach(15)
    assert sizes(run) == [4]
    for number in (1, 2):
        nodes.tell(f"kill {number}")
    shrunk = until_size(run, 2, seconds=60)
    for _ in range(2):
        nodes.tell("add")
    grown = until_size(run, 4, seconds=60)
    resumed = run.journal("resumed")[-1]["step"]
    nodes.tell("drain 0")
    drained = until_size(run, 2, seconds=60)
    assert run.wait() == 0, run.output[-3000:]
    print(
        f"on with two after {shrunk:.1f} s, with four after {grown:.1f} s, off the drained node after {drained:.1f} s"
    )
    assert run.journal("resumed")[-1]["step"] > resumed
    assert "is going away in" in run.output
    assert audit(run.run_dir) == []
    assert_same_curve(run, one)
    assert_same_curve(run, whole)


def test_a_run_of_fixed_size_waits_for_another_node_and_gives_up_with_the_numbers(nodes: Cluster, one: Command) -> None:
    nodes.tell("kill 0")
    nodes.tell("add")
    run = nodes.train("fixed", scaling__num_workers=4, scaling__wait_s=WAIT_S)
    run.reach(15)
    nodes.tell("kill 3")
    waits = rf"waiting for 4 x {{CPU: 1}}; the cluster has room for \d; giving up in {WAIT_S:.0f} s"
    run.until(lambda: re.search(waits, run.output), what=waits)
    number = nodes.tell("add").split()[0]
    run.until(lambda: len(sizes(run)) == 2 and saved_at_least(run, 50), what="the replacement")
    nodes.tell(f"kill {number}")
    assert run.wait() == 2, run.output[-3000:]
    assert f"waited {WAIT_S:.0f} s for 4 x {{CPU: 1}}; the cluster has room for 3" in run.output
    assert "the same command goes on from the last checkpoint" in run.output
    assert "Traceback" not in run.output
    assert run.saved() >= 50
    assert audit(run.run_dir) == []
    assert all(loss == pytest.approx(one.losses[step], rel=LIMIT) for step, loss in run.losses.items())


# ------------------------------------------------------------------------------------------------ a cable is cut

CUT_S = 60.0
"""From a cut to the next step without the machine beyond it, at most."""


@pytest.fixture
def machines(home: Home) -> Iterator[tuple[Machine, Machine]]:
    with two_machines(home.directory) as both:
        yield both


@pytest.fixture
def over_the_cable(home: Home, machines: tuple[Machine, Machine]) -> Callable[..., Command]:
    """Train on two machines of one CPU each, from the first."""
    environment = home.environment | LEAN | {"RAY_TMPDIR": str(home.directory / "ray")}
    address = start_ray(machines, home.directory, cpus=1, store=STORE, environment=environment)

    def train(name: str, **values: object) -> Command:
        recipe = home.recipe(name, model=PACE, **LONG_RUN | values)
        return Command(home, recipe, machines[0].prefix, address, environment).start()

    return train


def cable(machine: Machine, state: str) -> None:
    machine.run("ip", "link", "set", "eth0", state)


def test_a_rank_that_is_cut_off_is_named_and_done_without_and_taken_back_when_its_machine_is_there_again(
    machines: tuple[Machine, Machine], over_the_cable: Callable[..., Command], one: Command
) -> None:
    run = over_the_cable("cut", scaling__num_workers=[1, 2])
    run.reach(15)
    assert sizes(run) == [2]
    cable(machines[1], "down")
    alone = until_size(run, 1, seconds=CUT_S)
    assert "has not been heard of for" in run.output
    cable(machines[1], "up")
    both = until_size(run, 2, seconds=CUT_S)
    assert run.wait() == 0, run.output[-3000:]
    print(f"on alone {alone:.1f} s after the cut, together {both:.1f} s after its mending")
    assert audit(run.run_dir) == []
    assert_same_curve(run, one)


def test_a_run_of_fixed_size_that_is_cut_waits_and_gives_up_with_the_numbers(
    machines: tuple[Machine, Machine], over_the_cable: Callable[..., Command], one: Command
) -> None:
    run = over_the_cable("cut-fixed", scaling__num_workers=2, scaling__wait_s=WAIT_S)
    run.reach(15)
    cable(machines[1], "down")
    cut = time.monotonic()
    assert run.wait() == 2, run.output[-3000:]
    assert time.monotonic() - cut < CUT_S + WAIT_S
    assert "has not been heard of for" in run.output
    assert f"waited {WAIT_S:.0f} s for 2 x {{CPU: 1}}; the cluster has room for 1" in run.output
    assert run.saved() >= 10
    assert all(loss == pytest.approx(one.losses[step], rel=LIMIT) for step, loss in run.losses.items())
