"""How the ranks of a local cluster find each other: through a file, as torch's store would listen to everybody.

torch's TCPStore binds to all interfaces and asks for no token. On a cluster that one machine is, a file does as well.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
