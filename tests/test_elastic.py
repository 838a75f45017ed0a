"""Elastic runs: only sizes that the plan can be carried out on, only on nodes that stay, and a save before a resize."""

from __future__ import annotations

import math
import pickle
import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.train import ControllerError, ScalingConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller.state import (
    ReschedulingState,
    ResizingState,
    RunningState,
    SchedulingState,
    ShuttingDownState,
)
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from raytx import elastic, ray_internals
from raytx.errors import ResourceError, StoppedError

NODES = ("a", "b", "c", "d")


class Cluster:
    """Four nodes of one CPU, as Ray would tell of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = {node: {"CPU": 1.0} for node in NODES}
        self.draining: dict[str, float] = {}
        self.dead: set[str] = set()
        self.held: list[str] = []
        monkeypatch.setattr(ray_internals, "available_resources_per_node", lambda: self.free)
        monkeypatch.setattr(ray_internals, "draining_nodes", lambda: self.draining)
        monkeypatch.setattr(elastic.ray, "nodes", self.nodes)
        monkeypatch.setattr(elastic, "_answers", lambda address: address[0] not in self.dead)
        monkeypatch.setattr(elastic, "placement_group_table", lambda group: self.table)
        self.table: dict[str, Any] = {}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": n, "Alive": True, "NodeManagerAddress": n, "NodeManagerPort": 1} for n in self.free]

    def run(self, *nodes: str) -> None:
        """Have the run's own workers on these nodes."""
        for node in nodes:
            self.free[node] = {}  # Ray leaves out what there is none of
        self.table = {"state": "CREATED", "bundles_to_node_id": dict(enumerate(nodes))}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


class Client:
    """Takes the requests for resources that an autoscaler would hear of."""

    def maybe_send_resource_request(self, scaling_config: ScalingConfig, num_workers: int) -> None:
        self.asked = num_workers


def policy(
    sizes: tuple[int, ...] = (2, 4), told: list[str] | None = None, wait_s: float = math.inf, **options: Any
) -> elastic.Sizes:
    scaling = ScalingConfig(num_workers=(sizes[0], sizes[-1]), **({"elastic_resize_monitor_interval_s": 0} | options))
    made = elastic.Sizes(scaling, sizes, [].append if told is None else told.append, wait_s)
    made._coordinator_client = Client()
    return made


def at_start(made: elastic.Sizes) -> int | None:
    decision = made.make_decision_for_non_running_worker_group()
    assert isinstance(decision, NoopDecision | ResizeDecision)
    return decision.num_workers if isinstance(decision, ResizeDecision) else None


def while_running(made: elastic.Sizes, workers: int) -> int | None:
    handle = SimpleNamespace(placement_group="group")
    state = SimpleNamespace(start_time=time.monotonic() - 9, num_workers=workers, placement_group_handle=handle)
    decision = made.make_decision_for_running_worker_group(state, None)
    return decision.num_workers if isinstance(decision, ResizeDecision) else None


def test_a_run_starts_on_the_largest_usable_size_that_has_room(nodes: Cluster) -> None:
    assert at_start(policy()) == 4
    del nodes.free["a"]
    assert at_start(policy()) == 2
    assert at_start(policy((1, 3, 4))) == 3


def test_a_run_waits_while_even_its_smallest_size_has_no_room_and_says_so_once_in_a_while(nodes: Cluster) -> None:
    nodes.free = {"a": {"CPU": 1.0}}
    told: list[str] = []
    made = policy(told=told)
    assert [at_start(made), at_start(made)] == [None, None]
    assert told == ["waiting for 2 x {CPU: 1}; the cluster has room for 1"]


def test_a_run_that_waited_too_long_gives_up_with_the_numbers(nodes: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes.free = {"a": {"CPU": 1.0}}
    told: list[str] = []
    made = policy(told=told, wait_s=60.0)
    assert at_start(made) is None
    assert told[-1].endswith("giving up in 60 s")
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    with pytest.raises(ResourceError, match=r"waited 60 s for 2 x"):
        at_start(made)
    nodes.free = {"a": {"CPU": 4.0}}
    assert at_start(made) == 4
    nodes.free = {}
    assert at_start(made) is None


def test_a_run_that_waits_ends_when_it_is_told_to(nodes: Cluster) -> None:
    nodes.free = {}
    told_to_end: list[bool] = []
    scaling = ScalingConfig(num_workers=(2, 4), elastic_resize_monitor_interval_s=0)
    made = elastic.Sizes(scaling, (2, 4), [].append, stopped=lambda: bool(told_to_end))
    made._coordinator_client = Client()
    assert at_start(made) is None
    told_to_end.append(True)
    with pytest.raises(StoppedError):
        at_start(made)


class Scheduled:
    """Tries to start a group as Ray Train's controller does, and fails."""

    def __init__(self, made: elastic.Sizes) -> None:
        self._made = made

    def fails(self) -> None:
        assert at_start(self._made) == 4
        failure = ControllerError(WorkerGroupStartupTimeoutError(4))
        self._made.after_controller_state_update(
            SchedulingState(ResizeDecision(4, {"CPU": 1.0})), ReschedulingState(failure)
        )


def test_groups_that_do_not_start_though_there_is_room_are_tried_for_as_long_as_a_run_waits(
    nodes: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    made = policy(told=told, wait_s=60.0)
    group = Scheduled(made)
    for _ in range(20):
        group.fails()
    assert len(told) == 1
    assert told[0].startswith("waiting for 2 x {CPU: 1}; they did not start: The worker group startup timed out after")
    assert told[0].endswith("giving up in 60 s")
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    with pytest.raises(ResourceError, match=r"waited 60 s for 2 x .* they did not start"):
        at_start(made)


def test_a_group_that_starts_makes_good_for_those_that_did_not(nodes: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    made = policy(wait_s=60.0)
    group = Scheduled(made)
    group.fails()
    group.fails()
    made.after_controller_state_update(SchedulingState(ResizeDecision(4, {"CPU": 1.0})), RunningState())
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    group.fails()
    group.fails()


def test_what_other_programs_hold_is_no_room(nodes: Cluster) -> None:
    nodes.free["a"] = {"CPU": 0.5}
    assert at_start(policy()) == 2


def test_a_node_that_is_being_drained_or_is_dead_before_ray_knows_has_no_room(nodes: Cluster) -> None:
    nodes.draining["a"] = time.time() + 30
    assert at_start(policy((1, 2, 3, 4))) == 3
    nodes.dead.add("b")
    assert at_start(policy((1, 2, 3, 4))) == 2


def test_the_group_is_kept_off_nodes_that_are_leaving(nodes: Cluster) -> None:
    assert policy().on_controller_start_worker_group(scaling_config=None, num_workers=2) is None
    nodes.dead.add("b")
    nodes.draining["a"] = math.inf
    chosen = policy().on_controller_start_worker_group(scaling_config=None, num_workers=2)
    assert chosen == {"ray.io/node-id": "!in(a, b)"}


def test_a_run_grows_only_to_a_usable_size(nodes: Cluster) -> None:
    nodes.run("a", "b")
    del nodes.free["d"]
    assert while_running(policy(), 2) is None
    nodes.free["d"] = {"CPU": 1.0}
    assert while_running(policy(), 2) == 4


def test_a_run_keeps_the_places_of_its_own_workers(nodes: Cluster) -> None:
    nodes.run(*NODES)
    made = policy()
    assert while_running(made, 4) is None
    assert at_start(made) == 4  # its workers failed; their places are still held


def test_places_of_a_group_that_is_gone_are_not_counted(nodes: Cluster) -> None:
    nodes.run(*NODES)
    made = policy()
    assert while_running(made, 4) is None
    nodes.table["state"] = "REMOVED"  # and somebody else has taken them
    assert at_start(made) is None


def test_a_run_leaves_a_node_that_is_being_drained_at_once_and_says_so(nodes: Cluster) -> None:
    nodes.run(*NODES)
    nodes.draining["a"] = time.time() + 30
    told: list[str] = []
    assert while_running(policy(elastic_resize_monitor_interval_s=999, told=told), 4) == 2
    assert told == ["from 4 to 2 workers: nodes have come or are leaving"]


def test_a_run_moves_to_other_nodes_of_the_same_number_when_its_own_are_drained(nodes: Cluster) -> None:
    nodes.run("a", "b")
    nodes.draining["a"] = time.time() + 30
    assert while_running(policy((2,)), 2) == 2


def test_a_drained_node_without_workers_moves_nobody(nodes: Cluster) -> None:
    nodes.run("a", "b")
    nodes.draining["c"] = time.time() + 30
    assert while_running(policy(), 2) is None


def test_healthy_workers_are_not_given_up_for_a_node_that_does_not_answer(nodes: Cluster) -> None:
    nodes.run(*NODES)
    nodes.dead.add("a")
    assert while_running(policy(), 4) is None


def test_a_run_that_cannot_do_without_a_drained_node_stays_on_it(nodes: Cluster) -> None:
    nodes.run("a", "b")
    nodes.free = {node: nodes.free[node] for node in ("a", "b")}
    nodes.draining["a"] = time.time() + 30
    assert while_running(policy(), 2) is None


def test_an_autoscaler_is_asked_for_the_largest_usable_size(nodes: Cluster) -> None:
    made = policy((2, 4))
    at_start(made)
    assert made._coordinator_client.asked == 4


def test_workers_on_one_node_each_need_as_many_nodes(nodes: Cluster) -> None:
    nodes.free = {"a": {"CPU": 4.0}, "b": {"CPU": 4.0}, "c": {"CPU": 4.0}}
    assert at_start(policy(placement_strategy="STRICT_SPREAD")) == 2
    assert at_start(policy(placement_strategy="STRICT_PACK")) == 4


def test_a_machine_that_lives_answers_and_a_closed_port_does_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        assert elastic._answers(address)
    assert not elastic._answers(address)


def test_a_trainer_made_elastic_hands_its_controller_the_usable_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        DataParallelTrainer, "_initialize_and_run_controller", lambda self, **options: given.update(options)
    )
    trainer = DataParallelTrainer(print, scaling_config=ScalingConfig(num_workers=(2, 4)))
    elastic.make_elastic(trainer, (2, 4))
    assert pickle.loads(cloudpickle.dumps(elastic.Sizes(trainer.scaling_config, (2, 4), print)))._sizes == (2, 4)
    trainer._initialize_and_run_controller(scaling_policy="Ray's", callbacks=[])
    assert isinstance(given["scaling_policy"], elastic.Sizes)
    assert given["callbacks"] == []


# ---- before a resize


def test_healthy_workers_are_saved_before_they_are_killed_for_a_resize() -> None:
    asked: list[int] = []
    before = elastic.BeforeResize(asked.append)
    before.after_controller_state_update(RunningState(), ResizingState(ResizeDecision(4, {"CPU": 1.0})))
    assert asked == [4]


def test_workers_that_end_go_on_or_have_failed_are_not_asked_to_save() -> None:
    before = elastic.BeforeResize(lambda _: pytest.fail("asked"))
    before.after_controller_state_update(RunningState(), RunningState())
    before.after_controller_state_update(RunningState(), SchedulingState(ResizeDecision(2, {"CPU": 1.0})))
    before.after_controller_state_update(RunningState(), ShuttingDownState(next_state=RunningState()))


def test_a_save_that_fails_before_a_resize_ends_no_run(caplog: pytest.LogCaptureFixture) -> None:
    def fail(num_workers: int) -> None:
        raise OSError("disk full")

    elastic.BeforeResize(fail).after_controller_state_update(
        RunningState(), ResizingState(ResizeDecision(4, {"CPU": 1.0}))
    )
    assert "disk full" in caplog.text
