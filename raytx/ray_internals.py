"""Ray's private modules: every import from them is here, each with a word why, checked when a cluster is joined."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import operator
import os
import sys
from collections.abc import Iterator
from typing import Any

import ray

from raytx.errors import RaytxError

USED = {
    # loopback_only: Ray takes a machine's outside address for its own even when told 127.0.0.1
    "ray._private.ray_constants": ("ENABLE_RAY_CLUSTER", "ENABLE_RAY_CLUSTERS_ENV_VAR"),
    # own_session: a signal to the driver's process group would end the cluster before the run can save
    "ray._private.services": ("ConsolePopen",),
    # own_signals: Ray's handler of SIGTERM exits with the signal's bare number, and cleans nothing up
    "ray._private.utils": ("set_sigterm_handler",),
    # quiet: what the raylet says of dead workers is printed into the driver's output, whatever log_to_driver says
    "ray._private.worker": ("print_to_stdstream",),
    # any_agent_port: ray.init has no option for it
    "ray._private.parameter": ("RayParams",),
    # elastic.py: the policy that decides how many workers there are, and the moment before it changes their number
    "ray.train.v2._internal.execution.scaling_policy": (
        "ElasticScalingPolicy._count_possible_workers",
        "ElasticScalingPolicy._get_reserved_resources",
        "ElasticScalingPolicy._get_resize_decision",
        "NoopDecision",
        "ResizeDecision",
    ),
    "ray.train.v2._internal.execution.callback": ("ControllerCallback",),
    "ray.train.v2._internal.execution.controller.state": (
        "ReschedulingState",
        "ResizingState",
        "RunningState",
    ),
    # token mode is read once, when ray is imported; it must be read again after it was switched on
    "ray._raylet": ("Config", "AuthenticationTokenLoader"),
    # the public API sums free resources over nodes, but a bundle must fit on one
    "ray._private.state": ("available_resources_per_node", "state", "GlobalState.get_draining_nodes"),
    # placement groups of stopped trials: only the raw table says who made a group
    "ray.core.generated.gcs_pb2": ("PlacementGroupTableData",),
    # submit.py: a job's name follows from what is uploaded, so that is uploaded before the job is
    "ray.dashboard.modules.dashboard_sdk": ("SubmissionClient",),
    # launch.py: the trainer below TorchTrainer, which would have every worker import torch
    # without_cleaner: the trainer's own cleaner of placement groups needs the dashboard and stays behind without it
    "ray.train.v2.api.data_parallel_trainer": (
        "DataParallelTrainer._initialize_and_run_controller",
        "PlacementGroupCleanerCallback",
    ),
    # trials are named by a random word; a search that is begun again must find the runs it has
    "ray.tune.search.basic_variant": ("BasicVariantGenerator",),
    # the queue on which a trial's reports reach Tune
    "ray.tune.integration.ray_train": ("TuneReportCallback",),
}
"""Private or developer names that raytx relies on, and why."""
NODE_LABEL = "ray.io/node-id"
"""The label by which Ray puts workers on a node, or off it; its value is the node's id."""


def self_check() -> None:
    """Raise RaytxError when the installed Ray lacks a private name that raytx relies on."""
    missing = [f"{module}.{name}" for module, names in USED.items() for name in names if not _has(module, name)]
    if missing:
        raise RaytxError(
            f"Ray {ray.__version__} is not a version this raytx knows: it has no {', '.join(missing)}. "
            "Install ray>=2.59,<2.62"
        )


def _has(module: str, name: str) -> bool:
    try:
        operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError):
        return False
    return True


@contextlib.contextmanager
def loopback_only() -> Iterator[None]:
    """Make a cluster that is started meanwhile know itself as 127.0.0.1, so that all its processes bind there.

    `_node_ip_address="127.0.0.1"` does not do it: Ray replaces it with the machine's outside address and binds to all
    interfaces. The switch that Ray has for Windows and macOS, where it keeps clusters on loopback, works on Linux too.
    """
    from ray._private import ray_constants

    variable, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    outer = os.environ.get(variable)
    ray_constants.ENABLE_RAY_CLUSTER, os.environ[variable] = False, "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(variable)
        if outer is not None:
            os.environ[variable] = outer


def quiet() -> None:
    """Keep the raylet's words about dead workers out of this process's output; raytx tells of them in its own."""
    from ray._private import worker

    worker.print_to_stdstream = lambda *_, **__: None


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """Keep Ray from handling SIGTERM in the place of whoever starts or joins a cluster meanwhile: it would at once, and
    for good, and starting takes seconds."""
    from ray._private import utils

    before = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = before


@contextlib.contextmanager
def own_session() -> Iterator[None]:
    """Put the processes of a cluster that is started meanwhile into sessions of their own, on Linux.

    A supervisor's SIGTERM goes to the driver's whole process group. The cluster must outlive it, or ranks could not
    save. When the driver is gone the kernel ends them, which other systems' Ray does through the process group.
    """
    from ray._private import services

    before = services.ConsolePopen
    if sys.platform == "linux":
        services.ConsolePopen = functools.partial(before, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = before


@contextlib.contextmanager
def any_agent_port() -> Iterator[None]:
    """Let a cluster that is started meanwhile take a free port for its agent, which is what starts jobs.

    Ray takes 52365, and where another cluster of the machine has that one, its jobs never start.
    """
    from ray._private import parameter

    before = parameter.RayParams
    parameter.RayParams = functools.partial(before, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        parameter.RayParams = before


def token_mode_is_open() -> bool:
    """Tell whether a token is to be used: the user asked for it, or said nothing."""
    return os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"


def has_token() -> bool:
    """Tell whether a token is at hand and the user did not turn it off."""
    loader = importlib.import_module("ray._raylet").AuthenticationTokenLoader  # compiled, so without types
    return token_mode_is_open() and bool(loader.instance().has_token(ignore_auth_mode=True))


def use_token() -> None:
    """Switch this process, and what it starts, to token mode."""
    raylet = importlib.import_module("ray._raylet")
    os.environ["RAY_AUTH_MODE"] = "token"
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def available_resources_per_node() -> dict[str, dict[str, float]]:
    """Return {node id: {resource: unreserved amount}} of the live nodes."""
    from ray._private.state import available_resources_per_node as found

    return {node: dict(resources) for node, resources in found().items()}


def draining_nodes() -> dict[str, float]:
    """Return {node id: unix seconds at which it goes away} of the nodes being drained; inf where no time was told.

    Asks the GCS, in a few milliseconds, and can be called in any process of the cluster. The public way,
    ray.train.get_preemption_info(), is a barrier of all workers.
    """
    from ray._private.state import state

    return {node: at_ms / 1000 or math.inf for node, at_ms in state.get_draining_nodes().items()}


def ownerless_placement_groups() -> list[Any]:
    """Return the placement groups whose creating actor died: of trials that were stopped, workers and all.

    A group that an actor made belongs to the job and outlives the actor. Its creator is only in the raw table.
    """
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData as Data
    from ray.util.placement_group import PlacementGroup

    rows = [Data.FromString(raw) for raw in state._connect_and_get_accessor().get_placement_group_table()]
    job, nobody = bytes.fromhex(ray.get_runtime_context().get_job_id()), ray.ActorID.nil().binary()
    return [
        PlacementGroup(ray.PlacementGroupID(row.placement_group_id))
        for row in rows
        # Ray calls the creator dead, too, where a driver made the group and no actor
        if row.creator_actor_dead and row.creator_actor_id not in (b"", nobody)
        if row.creator_job_id == job and row.state != Data.REMOVED and not row.is_detached
    ]


def trainer(*args: Any, **options: Any) -> Any:
    """Return a trainer of plain Ray Train workers, in which Ray neither imports torch nor forms a process group."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    return DataParallelTrainer(*args, **options)


def without_cleaner() -> None:
    """Keep trainers of this process from starting their cleaner of placement groups; the search has its own reaper.

    Theirs asks the dashboard whether the controller lives. Without one it frees nothing and stays, an idle process for
    every trial.
    """
    from ray.train import UserCallback
    from ray.train.v2.api import data_parallel_trainer

    data_parallel_trainer.PlacementGroupCleanerCallback = UserCallback


def numbered(samples: Any) -> Any:
    """Name the trials of a sample generator trial_00000 and so on, the same whenever a search begins."""
    assert hasattr(samples, "_uuid_prefix")
    samples._uuid_prefix = "trial_"
    return samples
