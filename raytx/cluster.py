"""Connect to a Ray cluster, or start a local one that only this machine can reach, and wait until it has room.

What raytx starts listens on loopback: Ray's own processes (GCS, raylet, dashboard, agents, workers) all bind to
127.0.0.1, and a token is required besides; the ranks of a training run meet in a file (rendezvous.py). A cluster that
raytx only joins is bound as its owner bound it.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.util import placement_group, placement_group_table, remove_placement_group
from rich.console import Console

from raytx import ray_internals
from raytx.errors import RaytxError, ResourceError

DRIVER = "raytx_driver"
"""Custom resource of the drivers of trials: they use no CPU worth counting, and Ray wants something reserved."""
DRIVERS = 1000
"""How many drivers a local cluster holds: more than anybody runs."""
OBJECT_STORE_BYTES = 256 * 2**20
"""Shared memory of a local cluster. Batches are read from files; Ray's own traffic is small."""
REPORT_EVERY_S = 5.0
PASSED_ON = (
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "HF_TOKEN",
    "RAYTX_DISABLE_PLUGIN_AUTOLOAD",
    "RAYTX_PLUGINS",
    "RAYTX_STARTED_CLUSTER",
)

STARTED = "RAYTX_STARTED_CLUSTER"
"""Variable that holds the address of the local cluster that a process, or the one it works for, has started."""

Resources = Mapping[str, float]

_started: str | None = None
"""GCS address of the cluster that this process started."""


def connect(
    address: str | None = None, *, dashboard: bool = False, verbose: bool = False, num_cpus: int | None = None
) -> None:
    """Join the cluster at an address or in RAY_ADDRESS (set inside jobs); without either start a local one.

    Does nothing where Ray is initialised already. Raises ResourceError when the cluster cannot be reached or started.
    """
    if ray.is_initialized():
        return
    ray_internals.self_check()
    if not verbose:
        ray_internals.quiet()
    address = address or os.environ.get("RAY_ADDRESS")
    with ray_internals.own_signals():
        if address and address != "local":
            _join(address, verbose=verbose)
        else:
            _start(dashboard=dashboard, verbose=verbose, num_cpus=num_cpus)


def started_here() -> bool:
    """Tell whether the cluster is a local one, which no other node can ever join: of this process, or of the one that
    had it started."""
    ours = {_started, os.environ.get(STARTED)} - {None}
    return bool(ray.is_initialized() and ray.get_runtime_context().gcs_address in ours)


def wait_for(
    resources_of_one_worker: Resources,
    *,
    num_workers: int,
    wait_s: float,
    console: Console | None = None,
    placement_strategy: str = "PACK",
) -> None:
    """Wait until the cluster has room for a group of workers, saying what for; raise ResourceError when time is up.

    A local cluster cannot grow, so what it can never hold is refused at once. Elsewhere an autoscaler is asked for the
    missing nodes.
    """
    group = (resources_of_one_worker, num_workers, placement_strategy)
    if _has_room(free(), *group):
        return
    wanted, advice = described(resources_of_one_worker, num_workers), _advice(resources_of_one_worker)
    deadline, next_word = time.monotonic() + wait_s, 0.0
    with _nodes_asked_for(resources_of_one_worker, num_workers):
        while not _has_room(free(), *group):
            possible, now = _has_room(totals(), *group), time.monotonic()
            state = _state(resources_of_one_worker, num_workers, possible=possible)
            if not possible and started_here():
                raise ResourceError(f"{wanted} do not fit: {state}. {advice}")
            if now >= deadline:
                raise ResourceError(f"waited {wait_s:g} s for {wanted}: {state}. {advice}, or raise scaling.wait_s")
            if console and now >= next_word:
                console.print(
                    f"waiting for {wanted}: {state}; giving up in {deadline - now:.0f} s",
                    highlight=False,
                    soft_wrap=True,
                )
                next_word = now + REPORT_EVERY_S
            time.sleep(min(0.5, deadline - now))


def groups(
    resources_of_one_worker: Resources,
    *,
    num_workers: int,
    driver: Resources,
    nodes: Sequence[Resources],
    placement_strategy: str = "PACK",
) -> int:
    """Return how many drivers, each with its group of workers, fit on nodes at once. Bundles do not span nodes."""
    count, left = 0, [dict(node) for node in nodes]
    while _place([driver], left) and _place_group(resources_of_one_worker, num_workers, left, placement_strategy):
        count += 1
    return count


def most(
    sizes: Sequence[int], resources_of_one_worker: Resources, *, nodes: Sequence[Resources], placement_strategy: str
) -> int | None:
    """Return the largest group, of these sizes, that fits on nodes; None where none does."""
    fitting = (size for size in sizes if _has_room(nodes, resources_of_one_worker, size, placement_strategy))
    return max(fitting, default=None)


def passed_on() -> dict[str, str]:
    """Return the driver's variables that workers and replicas need; Ray passes on none by itself."""
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ}


def totals() -> list[dict[str, float]]:
    """Return the resources of each live node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def free() -> list[dict[str, float]]:
    """Return what is unreserved on each live node."""
    return list(ray_internals.available_resources_per_node().values())


def placed(one: Resources, *, num_workers: int, placement_strategy: str, wait_s: float) -> list[str]:
    """Return the node that each rank would get now: Ray is asked for the places, and they are given back at once.

    Raises ResourceError when they are not to be had within the time.
    """
    group = placement_group([dict(one)] * num_workers, strategy=placement_strategy)
    try:
        if not group.wait(timeout_seconds=wait_s):
            raise ResourceError(_state(one, num_workers, possible=False))
        bundles = placement_group_table(group)["bundles_to_node_id"]
    finally:
        remove_placement_group(group)
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    nodes = [bundles[place] for place in sorted(bundles)]
    order = list(dict.fromkeys(nodes))  # Ray Train numbers ranks node by node
    return [node_name(addresses[node], node) for node in sorted(nodes, key=order.index)]


def node_name(address: str, node_id: str) -> str:
    """Return what people call a node: its address, and the start of its id, as nodes may share a machine."""
    return f"{address} ({node_id[:6]})"


# ------------------------------------------------------------------------------------------------------ connect


def _join(address: str, *, verbose: bool) -> None:
    _check_address(address)
    if ray_internals.has_token():
        ray_internals.use_token()
    try:
        ray.init(address=address, **_noise(verbose))
    except Exception as error:  # Ray has many ways to say no
        ray.shutdown()
        raise ResourceError(f"cannot join the Ray cluster at {address}: {_first_line(error)}") from error


def _check_address(address: str) -> None:
    """Refuse what is no cluster's address, and one where nobody listens: Ray itself would retry for a minute."""
    if address.startswith(("http://", "https://")):
        raise RaytxError(f"{address} is a job server's address. Send a recipe there with `raytx submit --address`")
    if address.startswith("ray://"):
        raise RaytxError(
            f"{address}: Ray Client is not for training, as a lost connection loses the run. Use the cluster's address "
            "(host:6379) on one of its nodes, or `raytx submit` from elsewhere"
        )
    host, separator, port = address.rpartition(":")
    if not separator:
        return  # "auto" and the like, which Ray looks up
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"cannot join the Ray cluster at {address}: {error}. Is it up, and is this its port?"
        ) from None


def _start(*, dashboard: bool, verbose: bool, num_cpus: int | None) -> None:
    global _started
    if ray_internals.token_mode_is_open():
        _private_token()
        ray_internals.use_token()
    try:
        with (
            ray_internals.loopback_only(),
            ray_internals.any_agent_port(),
            ray_internals.own_session(),
            environment(_LOCAL_ENVIRONMENT),
        ):
            context = ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                object_store_memory=OBJECT_STORE_BYTES,
                resources={DRIVER: DRIVERS},
                _temp_dir=str(_temporary_directory()),
                **_noise(verbose),
            )
    except Exception as error:
        ray.shutdown()
        raise ResourceError(f"a local Ray cluster could not start: {_first_line(error)}") from error
    _started = os.environ[STARTED] = context.address_info["gcs_address"]


_LOCAL_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # a control process that died does not come back; without it the run ends, so sooner rather than after a minute
    "RAY_gcs_rpc_server_reconnect_timeout_s": "15",
    # gloo listens on the address of the host's name unless it is told otherwise
    "GLOO_SOCKET_IFNAME": "lo0" if os.uname().sysname == "Darwin" else "lo",
}


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables that are not set yet while Ray's processes, which inherit them, are started."""
    mine = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for key in mine:
            os.environ.pop(key, None)


def _noise(verbose: bool) -> dict[str, Any]:
    return {"logging_level": "INFO" if verbose else "ERROR", "log_to_driver": verbose}


def private_directory() -> Path:
    """Return a short directory that only this user may enter. Short, as a Unix socket's path has at most 107 bytes."""
    base = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / f"raytx-{os.getuid()}"
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = base.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ResourceError(f"{base} belongs to somebody else; set RAY_TMPDIR to a short directory of your own")
    base.chmod(0o700)
    return base


def _temporary_directory() -> Path:
    """Return where Ray of a local cluster keeps its files; it makes what it creates there open to everybody."""
    return private_directory() / "ray"


def _private_token() -> None:
    """Make sure there is a token that only this user can read. Ray would write it readable to all."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (
            contextlib.suppress(FileExistsError),
            open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file,
        ):
            file.write(secrets.token_hex(32))
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o600)
    except OSError as error:
        raise ResourceError(
            f"cannot keep Ray's token in {path}: {error}. Set RAY_AUTH_TOKEN_PATH to a private file"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --------------------------------------------------------------------------------------------------------- room


def _has_room(nodes: Sequence[Resources], one: Resources, num_workers: int, strategy: str) -> bool:
    return _place_group(one, num_workers, [dict(node) for node in nodes], strategy)


def _place_group(one: Resources, num_workers: int, left: list[dict[str, float]], strategy: str) -> bool:
    """Take a group of equal bundles from what is left on the nodes; tell whether it fits."""
    if strategy == "STRICT_PACK":
        return _place([{name: amount * num_workers for name, amount in one.items()}], left)
    if strategy == "STRICT_SPREAD":
        return _place([one] * num_workers, left, distinct=True)
    return _place([one] * num_workers, left)


def _place(bundles: Sequence[Resources], left: list[dict[str, float]], *, distinct: bool = False) -> bool:
    """Take each bundle from the fullest node that still holds it, so that small bundles do not break up empty nodes."""
    used: set[int] = set()
    for bundle in bundles:
        fitting = [
            place
            for place, node in enumerate(left)
            if place not in used and all(node.get(name, 0.0) + 1e-6 >= amount for name, amount in bundle.items())
        ]
        if not fitting:
            return False
        best = min(fitting, key=lambda place: sum(left[place].get(name, 0.0) for name in bundle))
        for name, amount in bundle.items():
            left[best][name] = left[best].get(name, 0.0) - amount
        if distinct:
            used.add(best)
    return True


@contextlib.contextmanager
def _nodes_asked_for(one: Resources, num_workers: int) -> Iterator[None]:
    """Tell an autoscaler, if there is one, what is missing; take it back in the end, or nodes would stay up."""
    if started_here():
        yield
        return
    request_resources(bundles=[dict(one)] * num_workers)
    try:
        yield
    finally:
        request_resources(num_cpus=0, bundles=[])


def described(one: Resources, num_workers: int) -> str:
    return f"{num_workers} x {{{', '.join(f'{name}: {_amount(name, one[name])}' for name in one)}}}"


def _state(one: Resources, num_workers: int, *, possible: bool) -> str:
    """Return what the cluster has of the wanted resources, and what it lacks where it is not a matter of time."""
    nodes, unreserved = totals(), free()
    parts = []
    for name in one:
        total, now = (sum(node.get(name, 0.0) for node in found) for found in (nodes, unreserved))
        parts.append(f"{_amount(name, total)} {name} in total, {_amount(name, now)} free")
    text = f"the cluster has {' and '.join(parts)}"
    if possible:
        return text
    if all(sum(node.get(name, 0.0) for node in nodes) >= one[name] * num_workers for name in one):
        largest = ", ".join(f"{_amount(name, max(node.get(name, 0.0) for node in nodes))} {name}" for name in one)
        text += f" over {len(nodes)} nodes, at most {largest} on one, and a worker does not span nodes"
    return text if started_here() else f"{text}; it is too small until nodes join"


def _advice(one: Resources) -> str:
    if one.get("GPU") and not any(node.get("GPU") for node in totals()):
        return "There is no GPU at all: set scaling.use_gpu=false"
    return "Lower scaling.num_workers or scaling.resources_per_worker"


def _amount(name: str, value: float) -> str:
    return f"{value / 2**30:.3g} GiB" if name == "memory" else f"{math.floor(value * 1e4 + 0.5) / 1e4:g}"
