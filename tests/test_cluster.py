"""Clusters: what raytx starts is private, what it joins is checked, and waiting ends with the numbers."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray._private import utils as ray_utils

from raytx import cluster, ray_internals
from raytx.errors import RaytxError, ResourceError

ONE_CPU = {"CPU": 1.0}

SCENARIO = """
import contextlib, io, json, os, time
import psutil, ray
from rich.console import Console
from ray.util.placement_group import placement_group, remove_placement_group
from raytx import cluster, ray_internals

facts, words = {}, io.StringIO()
console = Console(file=words, width=200)

@ray.remote
class Holder:
    def hold(self): return os.environ.get("RAY_AUTH_MODE")
    def reserve(self):
        self.groups = [placement_group([{"CPU": 1}]), placement_group([{"CPU": 2}])]  # one is placed, one waits
        return ray.get(self.groups[0].ready()) and True

def refusal(**kwargs):
    begun = time.monotonic()
    try:
        cluster.wait_for(kwargs.pop("one"), console=console, **kwargs)
    except Exception as error:
        return [type(error).__name__, str(error), time.monotonic() - begun]

def listening():
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    yield [process.name(), connection.laddr.ip]

cluster.connect(num_cpus=2, dashboard=True)
cluster.connect(num_cpus=64)  # a second call changes nothing
facts["cpus"] = ray.cluster_resources()["CPU"]
facts["drivers"] = ray.cluster_resources()[cluster.DRIVER]
facts["started_here"] = cluster.started_here()
holder = Holder.options(num_cpus=1).remote()
facts["mode_of_a_worker"] = ray.get(holder.hold.remote())
facts["listening"] = sorted(listening())
facts["too_many"] = refusal(one={"CPU": 1}, num_workers=4, wait_s=60)
facts["no_gpu"] = refusal(one={"GPU": 1}, num_workers=1, wait_s=60)
facts["busy"] = refusal(one={"CPU": 1}, num_workers=2, wait_s=2)
facts["words"] = words.getvalue()
ray.kill(holder)
cluster.wait_for({"CPU": 1}, num_workers=2, wait_s=30)
mine = placement_group([{"CPU": 0.5}])
ray.get(mine.ready())
leaker = Holder.options(num_cpus=0).remote()
ray.get(leaker.reserve.remote())
facts["ownerless_before"] = len(ray_internals.ownerless_placement_groups())
ray.kill(leaker)
deadline = time.monotonic() + 20
while len(found := ray_internals.ownerless_placement_groups()) < 2 and time.monotonic() < deadline:
    time.sleep(0.2)
facts["ownerless_after"] = len(found)
for group in found:
    remove_placement_group(group)
cluster.wait_for({"CPU": 1.5}, num_workers=1, wait_s=20)
facts["left_alone"] = ray.util.placement_group_table(mine)["state"]
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def facts(home: Path) -> dict[str, Any]:
    """What a process of its own saw of the cluster it started."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", SCENARIO],
        env=kept | {"HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "stdout": done.stdout, "stderr": done.stderr}


def test_every_socket_of_a_local_cluster_is_on_loopback(facts: dict[str, Any]) -> None:
    beyond = [(name, ip) for name, ip in facts["listening"] if not _is_loopback(ip)]
    assert beyond == []
    assert {"gcs_server", "raylet"} <= {name for name, _ in facts["listening"]}


def _is_loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def test_a_local_cluster_requires_a_token_that_only_its_user_can_read(facts: dict[str, Any], home: Path) -> None:
    token = home / ".ray" / "auth_token"
    assert facts["mode_of_a_worker"] == "token"
    assert len(token.read_text()) == 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_a_local_cluster_starts_without_a_word(facts: dict[str, Any]) -> None:
    assert len(facts["stdout"].splitlines()) == 1
    assert facts["stderr"] == ""


def test_a_second_connect_keeps_the_first_cluster(facts: dict[str, Any]) -> None:
    assert facts["cpus"] == 2
    assert facts["started_here"] is True


def test_a_local_cluster_has_room_for_drivers_besides_every_cpu(facts: dict[str, Any]) -> None:
    assert facts["drivers"] == cluster.DRIVERS


def test_what_a_local_cluster_can_never_hold_is_refused_at_once_with_the_numbers(facts: dict[str, Any]) -> None:
    kind, text, seconds = facts["too_many"]
    assert kind == "ResourceError"
    assert "4 x {CPU: 1} do not fit: the cluster has 2 CPU in total" in text
    assert "scaling.num_workers" in text
    assert seconds < 30


def test_use_gpu_without_a_gpu_is_refused_at_once_and_named(facts: dict[str, Any]) -> None:
    kind, text, seconds = facts["no_gpu"]
    assert kind == "ResourceError"
    assert "0 GPU in total" in text
    assert "scaling.use_gpu" in text
    assert seconds < 30


def test_a_busy_cluster_is_waited_for_and_given_up_on(facts: dict[str, Any]) -> None:
    kind, text, seconds = facts["busy"]
    assert kind == "ResourceError"
    assert "waited 2 s for 2 x {CPU: 1}: the cluster has 2 CPU in total, 1 free" in text
    assert seconds >= 2
    assert "waiting for 2 x {CPU: 1}: the cluster has 2 CPU in total, 1 free; giving up in 2 s" in facts["words"]


def test_groups_of_a_dead_actor_are_found_placed_or_waiting_and_no_others(facts: dict[str, Any]) -> None:
    assert facts["ownerless_before"] == 0
    assert facts["ownerless_after"] == 2
    assert facts["left_alone"] == "CREATED"


def test_a_bundle_does_not_span_nodes() -> None:
    nodes = [{"CPU": 1.0}, {"CPU": 1.0}]
    assert cluster.groups({"CPU": 2.0}, num_workers=1, driver={}, nodes=nodes) == 0
    assert cluster.groups(ONE_CPU, num_workers=2, driver={"CPU": 0.0}, nodes=nodes) == 1


@pytest.mark.parametrize(
    ("strategy", "nodes", "expected"),
    [
        ("PACK", [2, 2], 2),
        ("PACK", [1, 1, 1, 1], 2),
        ("STRICT_PACK", [1, 1, 1, 1], 0),
        ("STRICT_PACK", [5, 2], 3),
        ("STRICT_SPREAD", [4], 0),
        ("STRICT_SPREAD", [2, 2], 2),
        ("SPREAD", [4], 2),
    ],
)
def test_groups_of_two_workers_fit_as_the_placement_strategy_says(
    strategy: str, nodes: list[int], expected: int
) -> None:
    found = cluster.groups(
        ONE_CPU,
        num_workers=2,
        driver={cluster.DRIVER: 1.0},
        nodes=[{"CPU": float(cpus), cluster.DRIVER: 10.0} for cpus in nodes],
        placement_strategy=strategy,
    )
    assert found == expected


@pytest.mark.parametrize(
    ("strategy", "cpus", "expected"),
    [
        ("PACK", [2, 1], 3),
        ("PACK", [1], None),
        ("PACK", [9, 9], 4),
        ("STRICT_PACK", [3, 2], 3),
        ("STRICT_SPREAD", [9, 9], 2),
    ],
)
def test_the_largest_of_several_sizes_that_fits_is_found(strategy: str, cpus: list[int], expected: int | None) -> None:
    nodes = [{"CPU": float(count)} for count in cpus]
    assert cluster.most((2, 3, 4), ONE_CPU, nodes=nodes, placement_strategy=strategy) == expected


def test_a_driver_takes_its_sliver_of_a_cpu_from_the_workers() -> None:
    sliver = {"CPU": 0.01}
    assert cluster.groups(ONE_CPU, num_workers=2, driver=sliver, nodes=[{"CPU": 2.0}]) == 0
    assert cluster.groups(ONE_CPU, num_workers=2, driver=sliver, nodes=[{"CPU": 3.0}]) == 1
    assert cluster.groups(ONE_CPU, num_workers=2, driver=sliver, nodes=[{"CPU": 5.0}]) == 2


def test_small_bundles_leave_the_emptiest_node_whole() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 1.0}]
    assert cluster.groups({"CPU": 4.0}, num_workers=1, driver=ONE_CPU, nodes=nodes) == 1


@pytest.mark.parametrize(
    ("address", "hint"),
    [("http://127.0.0.1:8265", "raytx submit"), ("ray://127.0.0.1:10001", "Ray Client")],
)
def test_an_address_that_is_no_clusters_is_refused_with_what_to_use(address: str, hint: str) -> None:
    with pytest.raises(RaytxError, match=hint):
        cluster.connect(address)


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ResourceError, match=f"cannot join the Ray cluster at {address}"):
            cluster.connect(address)


def test_a_local_cluster_that_cannot_start_is_a_shortage_with_rays_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**kwargs: Any) -> None:
        raise RuntimeError("no room for the object store\nand a long trace")

    monkeypatch.setattr(cluster.ray, "init", fail)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ResourceError, match=r"a local Ray cluster could not start: no room for the object store$"):
        cluster.connect()


def test_sigterm_while_ray_starts_is_handled_by_whoever_starts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(**kwargs: Any) -> None:
        ray_utils.set_sigterm_handler(lambda number, frame: sys.exit(number))  # as ray.init does before all else
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("SIGTERM was lost")

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster.ray, "init", begin)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before, rays = signal.signal(signal.SIGTERM, interrupt), ray_utils.set_sigterm_handler
    try:
        with pytest.raises(KeyboardInterrupt):
            cluster.connect()
        assert signal.getsignal(signal.SIGTERM) is interrupt
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ray_utils.set_sigterm_handler is rays


def test_a_token_readable_by_others_is_made_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "token"
    path.write_text("0" * 64)
    path.chmod(0o644)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    cluster._private_token()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == "0" * 64


def test_a_temporary_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / f"raytx-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(ResourceError, match="belongs to somebody else"):
        cluster._temporary_directory()


def test_this_ray_has_every_private_name_that_raytx_uses() -> None:
    ray_internals.self_check()


def test_a_private_name_counts_as_there_whatever_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)  # as it is on loopback
    ray_internals.self_check()


def test_a_ray_that_moved_a_private_name_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ray_internals.USED, "ray._private.state", ("gone_in_the_next_version",))
    with pytest.raises(RaytxError, match=r"it has no ray\._private\.state\.gone_in_the_next_version"):
        ray_internals.self_check()
