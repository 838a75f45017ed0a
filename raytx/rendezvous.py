"""How the ranks of a run find each other: on a local cluster through a file, on others at the addresses of their nodes.

torch's TCPStore binds to all interfaces and asks for no token. On a cluster that one machine is, a file does as well.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend


class _FileBackend(_TorchBackend):  # type: ignore[misc]
    """Ray Train's torch backend with another way to meet; its other duties are left as they are."""

    def on_start(self, worker_group: Any, backend_config: FileTorchConfig) -> None:
        directory = Path(backend_config.directory)
        directory.mkdir(parents=True, exist_ok=True)
        meeting_point = directory / f"rendezvous-{uuid.uuid4().hex}"  # each attempt needs a fresh one
        worker_group.execute(_set_torch_distributed_env_vars)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank,
                    _setup_torch_process_group,
                    backend=backend_config.backend,
                    world_rank=rank,
                    world_size=len(worker_group),
                    init_method=f"file://{meeting_point}",
                    timeout_s=backend_config.timeout_s,
                )
                for rank in range(len(worker_group))
            ]
        )


@dataclass
class FileTorchConfig(TorchConfig):  # type: ignore[misc]
    """Ray Train's TorchConfig for ranks that share a machine and a directory."""

    directory: str = ""

    @property
    def backend_cls(self) -> type[_FileBackend]:
        return _FileBackend


class _AddressedBackend(_TorchBackend):  # type: ignore[misc]
    """Ray Train's torch backend, with gloo listening where Ray does."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_listen_at_the_nodes_address)
        super().on_start(worker_group, backend_config)


def _listen_at_the_nodes_address() -> None:
    """Tell gloo the interface of the node's address, unless the cluster's owner chose one.

    By itself it takes the address that the machine's name stands for, which many systems make a loopback one: ranks of
    other nodes would then be refused.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    address = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = interface


class AddressedTorchConfig(TorchConfig):  # type: ignore[misc]
    """Ray Train's TorchConfig for ranks on nodes that reach each other."""

    @property
    def backend_cls(self) -> type[_AddressedBackend]:
        return _AddressedBackend
