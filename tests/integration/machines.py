"""Stand-ins for machines: namespaces with a network, processes and mounts of their own, and a cable between two."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 6379
ENTERED = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
"""A network of its own; a process table of its own, so that nothing outlives the first process; and mounts of its own,
as Ray keeps its node's address in a file that another node of the machine would overwrite."""


class Machine:
    """A stand-in for a machine: namespaces that end with their first process, whose input this process holds."""

    def __init__(self, directory: Path, seen_as: Path) -> None:
        for path in (directory, seen_as):
            path.mkdir(exist_ok=True)
        script = 'mount --bind "$0" "$1" && ip link set lo up && echo up && exec cat'
        self._holder = subprocess.Popen(
            [*ENTERED, "sh", "-c", script, str(directory), str(seen_as)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stderr is not None
        if self._holder.stdout.readline() != "up\n":
            pytest.skip(f"this machine grants no network namespaces: {self._holder.stderr.read().strip()}")
        (first,) = psutil.Process(self._holder.pid).children()
        self.pid = first.pid

    @property
    def prefix(self) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--net", "--mount", "--pid"]

    def run(self, *command: str, environment: Mapping[str, str] | None = None) -> None:
        done = subprocess.run(
            [*self.prefix, *command], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {(done.stdout + done.stderr)[-3000:]}"

    def end(self) -> None:
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._holder.wait(timeout=20)
        self._holder.kill()  # the first process of the namespaces dies with it, and everything in them with that
        self._holder.wait()


@contextlib.contextmanager
def two_machines(directory: Path) -> Iterator[tuple[Machine, Machine]]:
    """Two machines with a cable between them, each with files of its own under directory / "ray", by whoever asks.

    Skips where namespaces or cables are not to be had.
    """
    if missing := [tool for tool in ("unshare", "nsenter", "ip", "mount") if shutil.which(tool) is None]:
        pytest.skip(f"needs {', '.join(missing)} (util-linux, iproute2)")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with contextlib.ExitStack() as stack:
        machines = []
        for name in ("a", "b"):
            machines.append(Machine(directory / name, directory / "ray"))
            stack.callback(machines[-1].end)
        one, other = machines
        _connect(one, other)
        yield one, other


def _connect(one: Machine, other: Machine) -> None:
    ends = [["eth0", "netns", str(machine.pid)] for machine in (one, other)]
    cable = ["ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1]]
    laid = subprocess.run(cable, capture_output=True, text=True, check=False)
    if laid.returncode != 0:
        pytest.skip(f"this machine has no virtual cables: {laid.stderr.strip()}")
    for machine, address in zip((one, other), ADDRESSES, strict=True):
        machine.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        machine.run("ip", "link", "set", "eth0", "up")


def start_ray(
    machines: Sequence[Machine], directory: Path, *, cpus: int, store: int, environment: Mapping[str, str]
) -> str:
    """Start a Ray head on the first machine and a node on the other; return the address. They end with the machines."""
    node = [f"--num-cpus={cpus}", f"--object-store-memory={store}", f"--temp-dir={directory / 'ray'}"]
    head = ["--head", f"--port={PORT}", "--include-dashboard=false"]
    roles = (head, [f"--address={ADDRESSES[0]}:{PORT}"])
    for machine, address, role in zip(machines, ADDRESSES, roles, strict=True):
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={address}"]
        machine.run(*start, *role, *node, environment=environment)
    return f"{ADDRESSES[0]}:{PORT}"
