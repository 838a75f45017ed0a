"""Let workers of a run come and go: Ray Train's elastic policy, held to the sizes that the plan can be carried out on.

Ray's policy knows no sizes between which it must not stop, and counts what nodes have in all, not what is free on them.
"""

from __future__ import annotations

import logging
import math
import signal
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState, ResizingState, RunningState
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision
from ray.util import placement_group_table

from raytx import cluster, ray_internals
from raytx.errors import ResourceError, StoppedError

RESIZE_INTERVAL_S = 15.0
"""Seconds between looks at whether more workers would have room. A look costs a few milliseconds."""
START_TIMEOUT_S = 20.0
"""Seconds for a group to get its places: they were free a moment ago, so more waiting means that a node is gone."""
REMIND_S = 30.0
"""Seconds between two words that the run waits for nodes."""
ANSWER_TIMEOUT_S = 1.0
"""Seconds for a node's raylet to accept a connection."""


def make_elastic(
    trainer: Any,
    sizes: Sequence[int],
    *,
    wait_s: float = math.inf,
    tell: Callable[[str], object] = lambda text: None,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Let a Ray Train trainer, whose scaling config has a range of workers, run on these numbers of them only.

    `tell` hears, in Ray Train's controller, that the run waits for nodes or changes its size. When there was no room
    for the smallest size for `wait_s` seconds, or no group would start, the run ends with a ResourceError; when
    `stopped` says meanwhile that it was told to end, with a StoppedError.
    """
    run, policy = trainer._initialize_and_run_controller, Sizes(trainer.scaling_config, sizes, tell, wait_s, stopped)
    trainer._initialize_and_run_controller = lambda **given: run(**given | {"scaling_policy": policy})


class Sizes(ElasticScalingPolicy):  # type: ignore[misc]
    """The largest usable size that has room: on what is free, and on what the run's own workers hold already.

    Ray asks it when a group is to start, and at every poll of one that runs. A node that is being drained has no room.
    """

    def __init__(
        self,
        scaling_config: ScalingConfig,
        sizes: Sequence[int],
        tell: Callable[[str], object],
        wait_s: float = math.inf,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(scaling_config)
        self._sizes, self._tell, self._wait_s, self._stopped = tuple(sizes), tell, wait_s, stopped
        self._group: Any = None
        self._waits_since: float | None = None
        self._next_word = 0.0
        self._not_started = ""
        """Why the last group did not start, where none has since."""

    def make_decision_for_non_running_worker_group(self) -> Any:
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            self._wait(self._lack())
        elif self._not_started:  # there seems to be room, so Ray would try again at once, for ever
            self._wait(self._not_started)
        else:
            self._waits_since = None
        return decision

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Take note of groups that do not start, and of one that does."""
        if isinstance(current_state, ReschedulingState):
            self._not_started = f"they did not start: {_gist(current_state.training_failed_error)}"
        elif isinstance(current_state, RunningState):
            self._not_started, self._waits_since = "", None

    def _lack(self) -> str:
        one = self.scaling_config._resources_per_worker_not_none
        fits = cluster.most(range(1, self._sizes[0]), one, nodes=self._room(), placement_strategy=self._strategy) or 0
        return f"the cluster has room for {fits}"

    def _wait(self, why: str) -> None:
        """Say from time to time what is waited for, and why; raise ResourceError when that took too long."""
        if self._stopped():
            raise StoppedError("told to end while waiting for nodes", exit_code=128 + signal.SIGTERM)
        now = time.monotonic()
        self._waits_since = now if self._waits_since is None else self._waits_since
        left = self._waits_since + self._wait_s - now
        wanted = f"{cluster.described(self.scaling_config._resources_per_worker_not_none, self._sizes[0])}; {why}"
        if left < 0:
            raise ResourceError(
                f"waited {self._wait_s:g} s for {wanted}. When there is room again, the same command goes on from the "
                "last checkpoint; raise scaling.wait_s to wait longer"
            )
        if now >= self._next_word:
            self._next_word = now + REMIND_S
            self._tell(f"waiting for {wanted}" + (f"; giving up in {left:.0f} s" if math.isfinite(left) else ""))

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        self._group = worker_group_state.placement_group_handle.placement_group
        now = worker_group_state.num_workers
        if ray_internals.draining_nodes().keys() & _held(self._group):
            to = self._count_possible_workers(None)  # elsewhere, and now: what is drained will be gone
            decision = self._get_resize_decision(to) if to else NoopDecision()
        else:
            decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
            if getattr(decision, "num_workers", now) < now:  # Ray has lost sight of a worker; if it died, that is seen
                decision = NoopDecision()
        if isinstance(decision, ResizeDecision):
            self._tell(f"from {now} to {decision.num_workers} workers: nodes have come or are leaving")
        return decision

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> dict[str, str] | None:
        """Keep the group off nodes that are leaving."""
        without = leaving()
        return {ray_internals.NODE_LABEL: f"!in({', '.join(sorted(without))})"} if without else None

    def _get_reserved_resources(self) -> Mapping[str, Any]:
        """Ask nobody: what the coordinator reserves is told late, and counts what other programs hold."""
        return {}

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        one = self.scaling_config._resources_per_worker_not_none
        return cluster.most(self._sizes, one, nodes=self._room(), placement_strategy=self._strategy) or 0

    def _room(self) -> list[dict[str, float]]:
        one = self.scaling_config._resources_per_worker_not_none
        return room(one, held=_held(self._group), without=leaving())

    @property
    def _strategy(self) -> Any:
        return self.scaling_config.placement_strategy


def _gist(error: Exception) -> str:
    """Return the first sentence of an error's last line, where Ray puts what happened; advice follows it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip().partition(". ")[0]


def room(one: Mapping[str, float], *, held: Sequence[str], without: Collection[str]) -> list[dict[str, float]]:
    """Return what workers can have on each node: what is free, and what the run's own workers there hold.

    `one` is what a worker takes, `held` the node of each worker there is.
    """
    return [
        {name: free.get(name, 0.0) + held.count(node) * amount for name, amount in one.items()}
        for node, free in ray_internals.available_resources_per_node().items()
        if node not in without
    ]


def leaving() -> set[str]:
    """Return the nodes that Ray still counts but that no worker should be put on: drained ones, and dead ones.

    Ray takes 15 s and more to call a node dead, in which it would wait for places there. A machine that lives accepts
    a connection to its raylet at once, however busy it is.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    with ThreadPoolExecutor(max_workers=32) as pool:
        answers = pool.map(_answers, [(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in nodes])
    silent = {node["NodeID"] for node, answered in zip(nodes, answers, strict=True) if not answered}
    return silent | ray_internals.draining_nodes().keys()


def _answers(address: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(address, timeout=ANSWER_TIMEOUT_S):
            return True
    except OSError:
        return False


def _held(group: Any) -> list[str]:
    """Return the node of each bundle of a placement group; nothing for one that is gone."""
    table = placement_group_table(group) if group is not None else {}
    return list(table.get("bundles_to_node_id", {}).values()) if table.get("state") != "REMOVED" else []


class BeforeResize(ControllerCallback):  # type: ignore[misc]
    """Holds a resize of healthy workers until `save` returns: they train on meanwhile, and are killed after it.

    `save` is called in Ray Train's controller with the number of workers to be, and must keep its own time limit. What
    goes wrong in it costs no more than the steps since the last checkpoint.
    """

    def __init__(self, save: Callable[[int], object]) -> None:
        self._save = save

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, ResizingState):
            try:
                self._save(current_state.scaling_decision.num_workers)
            except Exception:  # Ray would end the run, which has done nothing wrong
                logging.getLogger(__name__).exception("no checkpoint before the resize")
