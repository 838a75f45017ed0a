"""A Ray cluster of one-CPU nodes on this machine that is told over its input to add, kill, drain or end them.

Run as `python cluster_holder.py <nodes> <bytes of object store>`. Each line that it is told is answered by one.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import psutil
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

DRAINED_S = 60


class Nodes:
    """The nodes by number, from 0; the head has no CPU to give, so what is killed holds nothing but ranks."""

    def __init__(self, count: int, store: int) -> None:
        self._store = {"object_store_memory": store}
        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False} | self._store
        )
        self._nodes: dict[int, Any] = {}
        for _ in range(count):
            self.add()

    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> str:
        number = max(self._nodes, default=-1) + 1
        self._nodes[number] = self._cluster.add_node(num_cpus=1, **self._store)
        return f"{number} {self._nodes[number].node_id}"

    def kill(self, number: str) -> str:
        """Kill a node's raylet and whatever it started, as when its machine is gone."""
        node = self._nodes.pop(int(number))
        (raylet,) = node.all_processes["raylet"]
        family = [*psutil.Process(raylet.process.pid).children(recursive=True), psutil.Process(raylet.process.pid)]
        for process in reversed(family):
            process.kill()
        self._cluster.worker_nodes.discard(node)
        return str(len(family))

    def drain(self, number: str) -> str:
        deadline = int((time.time() + DRAINED_S) * 1000)
        node_id = self._nodes[int(number)].node_id
        reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        return str(GcsClient(self.address()).drain_node(node_id, reason, "spot", deadline))

    def end(self) -> str:
        self._cluster.shutdown()
        return "ended"


def main() -> None:
    nodes = Nodes(int(sys.argv[1]), int(sys.argv[2]))
    for line in sys.stdin:
        word, *rest = line.split()
        print("answer", getattr(nodes, word)(*rest), flush=True)


if __name__ == "__main__":
    main()
