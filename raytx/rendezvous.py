"""How the ranks of a run find each other: on a local cluster through a file, on others at rank 0's node.

torch's TCPStore binds to all interfaces and asks for no token. On a cluster that one machine is, a file does as well.
"""

from __future__ import annotations

import contextlib
import importlib
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

PART_S = 30.0
"""How long ranks wait for one another before they part."""


def in_file(directory: Path, name: str) -> str:
    """Return a meeting point for ranks that share a machine and a directory; each meeting needs another name."""
    directory.mkdir(parents=True, exist_ok=True)
    return f"file://{directory / name}"


def at(address: str, port: int) -> str:
    """Return a meeting point at rank 0's node."""
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def free_port(address: str) -> int:
    """Return a port that nobody has at an address of this machine right now."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


def interface(address: str) -> str | None:
    """Return the network interface of one of this machine's addresses.

    gloo by itself takes the address that the machine's name stands for, which many systems make a loopback one: ranks
    of other nodes would then be refused.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            return str(name)
    return None


def meet(
    point: str, *, backend: str, rank: int, world_size: int, timeout_s: float, device: str | None = None
) -> Meeting:
    """Form torch's default process group, after making this rank's GPU the current one: NCCL uses that. Collective."""
    if device is not None:
        importlib.import_module("torch").cuda.set_device(device)
    dist, limit = importlib.import_module("torch.distributed"), timedelta(seconds=timeout_s)
    store, _, _ = next(iter(dist.rendezvous(point, rank, world_size, timeout=limit)))
    store.set_timeout(limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    return Meeting(store, rank, world_size)


@dataclass(frozen=True)
class Meeting:
    """The ranks that have met."""

    store: Any
    """torch's store, through which they found each other."""
    rank: int
    world_size: int

    def part(self) -> None:
        """Take the process group down when all ranks are past their last collective.

        Who leaves earlier may fail those who are slower: gloo raises for an operation that has ended well, where its
        peer is gone by the time that its end is looked at. Who does not come in time is not waited for.
        """
        with contextlib.suppress(Exception):  # rank 0 holds the store, and leaves when it has seen all
            self.store.set(_past(self.rank), b"")
            self.store.wait([_past(rank) for rank in range(self.world_size)], timedelta(seconds=PART_S))
        importlib.import_module("torch.distributed").destroy_process_group()


def _past(rank: int) -> str:
    return f"raytx-past-{rank}"
