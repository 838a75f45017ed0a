"""How the ranks of a run find each other: on a local cluster through a file, on others at rank 0's node.

torch's TCPStore binds to all interfaces and asks for no token. On a cluster that one machine is, a file does as well.
"""

from __future__ import annotations

import importlib
import socket
from datetime import timedelta
from pathlib import Path

import psutil


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


def meet(point: str, *, backend: str, rank: int, world_size: int, timeout_s: float, device: str | None = None) -> None:
    """Form torch's default process group, after making this rank's GPU the current one: NCCL uses that. Collective."""
    if device is not None:
        importlib.import_module("torch").cuda.set_device(device)
    dist = importlib.import_module("torch.distributed")
    dist.init_process_group(
        backend, init_method=point, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )


def part() -> None:
    """Take the process group down where there is one."""
    dist = importlib.import_module("torch.distributed")
    if dist.is_initialized():
        dist.destroy_process_group()
