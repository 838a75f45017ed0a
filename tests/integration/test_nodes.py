"""One job over several nodes: four that share a host, and two with addresses of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import parity_matrix as matrix
import pytest
from machines import ADDRESSES, start_ray, two_machines

from raytx.journal import rows
from raytx.recipe import Recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
LIMIT = 1e-5
"""Relative, per step, in fp32: as in test_parity.py, nodes change nothing."""
LR = 2e-3
"""At the tiny recipe's own rate, 5e-3, the decoder of the parity matrix passes through a step whose gradient norm moves
by 1e-4 when its first weights move by 1e-7; here it is 6e-6, and strategies can be told from rounding."""
STORE = 80 * 2**20
"""Bytes of each node's object store: the least that Ray takes."""
LEAN = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # all workers import torch at once, on as few cores as there are
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
}
LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what keeps Ray on loopback, see raytx/ray_internals.py
    "GLOO_SOCKET_IFNAME": "lo",
}


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that is up, and how a command is run on one of its nodes."""

    address: str
    environment: Mapping[str, str]
    prefix: Sequence[str] = ()
    """What enters the node, before the command."""

    def raytx(self, *arguments: object) -> str:
        """Run a raytx command against the cluster and return what it said; it must succeed."""
        command = [*self.prefix, sys.executable, "-m", "raytx", *map(str, arguments), "--address", self.address]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        return done.stdout


def three_d(data: int, pipeline: int, tensor: int) -> dict[str, Any]:
    case = matrix.grid(data, pipeline, tensor)
    return {"strategy": case.strategy, "scaling.num_workers": case.workers}


@pytest.fixture(scope="module")
def written(recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write the recipe of our own decoder to a file, as a user has it."""

    def write(name: str, **values: Any) -> Path:
        path = tmp_path_factory.mktemp("recipes") / f"{name}.yaml"
        path.write_text(recipe(name, model=matrix.DECODER, optim__lr=LR).override(values).to_yaml())
        return path

    return write


@pytest.fixture(scope="module")
def reference(recipe: Callable[..., Recipe], run_ranks: Callable[..., Any]) -> list[dict[str, Any]]:
    """The recipe's steps in one process, without Ray."""
    (log,) = run_ranks([recipe("nodes-one", model=matrix.DECODER, optim__lr=LR)])
    return steps(log)


def steps(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in log if row["kind"] == "step"]


def journal(storage: Path, name: str) -> list[dict[str, Any]]:
    return rows(storage / name / "metrics.jsonl")


def assert_same_curve(log: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> None:
    """Loss and gradient norm of every step are those of one process; clipping is active, or norms would mean little."""
    assert len(reference) == 20
    assert sum(row["grad_norm"] > 0.5 for row in reference) > 5
    for ours, theirs in zip(steps(log), reference, strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=LIMIT), f"{key} of step {ours['step']}"


def placed(log: Sequence[dict[str, Any]]) -> list[str]:
    """Return the node of each rank, as the run recorded it."""
    (record,) = [row for row in log if row["kind"] == "placed"]
    nodes: list[str] = record["nodes"]
    return nodes


def changes(nodes: Sequence[str]) -> int:
    """Return how often the node changes from one rank to the next."""
    return sum(one != other for one, other in pairwise(nodes))


def _surroundings() -> dict[str, str]:
    """Return this process's environment without what would steer Ray or gloo."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "GLOO_"))}


@pytest.fixture(scope="module")
def short_directory() -> Iterator[Path]:
    """A directory for Ray whose sockets' paths stay under 107 bytes."""
    directory = Path(tempfile.mkdtemp(prefix="rx", dir="/tmp"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


# ---------------------------------------------------------------------------------------- four nodes on one host

FOUR_NODES = """
import sys
from ray.cluster_utils import Cluster

node = {"num_cpus": 2, "object_store_memory": STORE}
cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
for _ in range(3):
    cluster.add_node(**node)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def four_nodes(short_directory: Path) -> Iterator[Cluster]:
    """Four nodes of two CPUs each, all on loopback, in the hands of a process that ends them when its input ends."""
    environment = _surroundings() | LEAN | LOOPBACK | {"RAY_TMPDIR": str(short_directory)}
    with subprocess.Popen(
        [sys.executable, "-c", FOUR_NODES.replace("STORE", str(STORE))],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        address = next((line.strip() for line in holder.stdout if re.fullmatch(r"[\d.]+:\d+\n", line)), None)
        assert address is not None, f"no cluster came up; its process ended with {holder.wait()}"
        yield Cluster(address, environment)
        holder.stdin.close()
        holder.wait(timeout=60)


def test_a_plan_names_the_node_of_every_rank(four_nodes: Cluster, written: Callable[..., Path]) -> None:
    shown = four_nodes.raytx("plan", written("nodes-plan", **three_d(2, 2, 2)))
    header = re.search(r"^ *node +rank +pipeline +data +sequence +tensor.*$", shown, re.MULTILINE)
    assert header is not None, shown
    grid = re.findall(r"^ *(\S+ \(\w{6}\)) +(\d) +(\d) +(\d) +0 +(\d) ", shown, re.MULTILINE)
    assert [tuple(map(int, row[1:])) for row in grid] == [
        (4 * pipeline + 2 * data + tensor, pipeline, data, tensor)
        for pipeline in (0, 1)
        for data in (0, 1)
        for tensor in (0, 1)
    ]
    nodes = [row[0] for row in grid]
    assert len(set(nodes)) == 4
    assert changes(nodes) == 3


def test_three_dimensions_over_four_nodes_give_the_numbers_of_one_process(
    four_nodes: Cluster, written: Callable[..., Path], storage: Path, reference: list[dict[str, Any]]
) -> None:
    said = four_nodes.raytx("train", written("nodes-four", **three_d(2, 2, 2)))
    assert "done at step 20" in said
    log = journal(storage, "nodes-four")
    assert_same_curve(log, reference)
    nodes = placed(log)
    assert len(nodes) == 8
    assert len(set(nodes)) == 4
    assert nodes[0::2] == nodes[1::2], "the two ranks of a tensor-parallel group share a node"


# ------------------------------------------------------------------------------- two nodes with their own addresses


@pytest.fixture
def two_addresses(short_directory: Path) -> Iterator[Cluster]:
    """A Ray head on one machine and a node on the other, as `ray start` makes them; it ends with the machines."""
    environment = _surroundings() | LEAN
    with two_machines(short_directory) as machines:
        address = start_ray(machines, short_directory, cpus=2, store=STORE, environment=environment)
        yield Cluster(address, environment, machines[0].prefix)


def test_three_dimensions_over_two_addresses_give_the_numbers_of_one_process(
    two_addresses: Cluster, written: Callable[..., Path], storage: Path, reference: list[dict[str, Any]]
) -> None:
    said = two_addresses.raytx("train", written("nodes-two", **three_d(1, 2, 2)))
    assert "done at step 20" in said
    log = journal(storage, "nodes-two")
    assert_same_curve(log, reference)
    first, second = ADDRESSES
    assert [node.split()[0] for node in placed(log)] in ([first, first, second, second], [second, second, first, first])
