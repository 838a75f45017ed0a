"""One Ray Train run: a group of keepers that the supervisor leads to the plan's last step, shown while it goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.train import (
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
    WorkerGroupError,
)
from ray.train.backend import Backend, BackendConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from raytx import cluster, ray_internals, status
from raytx.elastic import RESIZE_INTERVAL_S, START_TIMEOUT_S, BeforeResize, make_elastic
from raytx.errors import RaytxError, StoppedError, TrainingError
from raytx.journal import Display
from raytx.keeper import keep
from raytx.plan import Plan
from raytx.supervisor import Supervisor
from raytx.worker import Record

RELAY_S = 0.2
SIGNALS = (signal.SIGINT, signal.SIGTERM)
COLLECTIVE_TIMEOUT_S = 600


def launch(plan: Plan, *, callbacks: Sequence[UserCallback] = (), console: Console) -> None:
    """Train a plan to its last step, restarting ranks as the failure policy says. Ray must be connected.

    Raises StoppedError when the run was told to end before, TrainingError or RaytxError when it cannot go on.
    """
    assert plan.steps is not None
    _configure()
    here = ray.get_runtime_context().get_node_id()
    # Nowhere else: a node that is lost or cut off must not take with it what would notice.
    beside_the_driver = NodeAffinitySchedulingStrategy(here, soft=False)
    supervisor = Supervisor.options(  # type: ignore[attr-defined]
        scheduling_strategy=beside_the_driver
    ).remote(_settings(plan))
    if cluster.started_here():  # libraries load while Ray Train starts
        supervisor.warm.remote(here)
    with Display(total_steps=plan.steps, console=console) as display, _relayed(supervisor, display, plan.run_dir):
        end, number = _interruptible(lambda: _fit(_trainer(plan, supervisor, callbacks)), supervisor, console)
    _judge(end, plan, number)


def environment(plan: Plan) -> dict[str, str]:
    """Return the environment variables of this plan's processes, which must be set before they import torch."""
    scaling = plan.recipe.scaling
    return {
        "OMP_NUM_THREADS": str(scaling.threads_per_worker),
        "TOKENIZERS_PARALLELISM": "false",
        # to ask for GPUs without starting CUDA, which a process that forks ranks must not
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        **cluster.passed_on(),
        **plan.recipe.strategy.environment(use_gpu=scaling.use_gpu),
    }


def _settings(plan: Plan) -> dict[str, Any]:
    """Return what the supervisor needs to know."""
    scaling = plan.recipe.scaling
    return {
        "plan": plan.to_dict(),
        "run_dir": str(plan.run_dir),
        "environment": environment(plan),
        "local": cluster.started_here(),
        "resources": plan.resources_per_worker,
        "max_failures": scaling.max_failures,
        "stall_s": scaling.stall_s,
        "grace_s": scaling.grace_s,
    }


def _trainer(plan: Plan, supervisor: Any, callbacks: Sequence[UserCallback]) -> Any:
    scaling = plan.recipe.scaling
    trainer = ray_internals.trainer(
        keep,
        train_loop_config={
            "supervisor": supervisor,
            "plan": plan.to_dict(),
            "backend": "nccl" if scaling.use_gpu else "gloo",
            "timeout_s": COLLECTIVE_TIMEOUT_S,
            "local": cluster.started_here(),
            "use_gpu": scaling.use_gpu,
            "grace_s": scaling.grace_s,
        },
        backend_config=SharedGPUs(),
        scaling_config=ScalingConfig(
            num_workers=(plan.sizes[0], plan.sizes[-1]),
            use_gpu=scaling.use_gpu,
            resources_per_worker=plan.resources_per_worker,
            placement_strategy=scaling.placement_strategy,
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
        ),
        run_config=_run_config(plan, supervisor, callbacks),
    )
    make_elastic(
        trainer,
        plan.sizes,
        wait_s=scaling.wait_s,
        tell=supervisor.remark.remote,
        stopped=lambda: ray.get(supervisor.told_to_end.remote()),
    )
    return trainer


def _run_config(plan: Plan, supervisor: Any, callbacks: Sequence[UserCallback]) -> RunConfig:
    return RunConfig(
        # Checkpoints are raytx's own; what Ray keeps of a run is of this attempt alone, so it gets a new name.
        name=f"{int(time.time())}-{os.getpid()}",
        storage_path=str(plan.run_dir / ".ray"),
        # what may fail how often: supervision.py; for how long workers may not start: elastic.py
        failure_config=FailureConfig(max_failures=-1, controller_failure_limit=-1),
        callbacks=[
            TellFailures(supervisor),
            BeforeResize(lambda workers: ray.get(supervisor.resize.remote())),
            *callbacks,
        ],
    )


class _Sharing(Backend):  # type: ignore[misc]
    """Ranks form their process group themselves; Ray lets those of a node see one another's GPUs, as NCCL needs."""

    share_cuda_visible_devices = True


class SharedGPUs(BackendConfig):  # type: ignore[misc]
    """The backend of keepers."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Sharing


# ------------------------------------------------------------------------------------------------- how a run ends


def _fit(trainer: Any) -> dict[str, Any]:
    """Run Ray Train; return what rank 0's keeper did."""
    try:
        end: dict[str, Any] = trainer.fit().return_value or {}
        return end
    except WorkerGroupError as error:
        rank, cause = first_cause(error.worker_failures)
        raise RaytxError(
            f"the worker of rank {rank} failed ({_gist(cause)}), and no restart is left (scaling.max_failures). The "
            "same command goes on from the last checkpoint"
        ) from error
    except (TrainingFailedError, ray.exceptions.RayTaskError) as error:
        cause = error.controller_failure if isinstance(error, ControllerError) else getattr(error, "cause", error)
        if isinstance(cause, StoppedError):  # told to end while it waited for room
            return {}
        if isinstance(cause, RaytxError):
            raise cause from None
        if isinstance(error, ray.exceptions.RayTaskError):
            raise
        raise RaytxError(
            f"Ray Train gave up ({_gist(cause)}). The same command goes on from the last checkpoint"
        ) from error
    except ray.exceptions.RayActorError as error:
        raise RaytxError(
            "Ray Train's controller died, and the run with it. The same command goes on from the last checkpoint"
        ) from error


def _judge(end: Mapping[str, Any], plan: Plan, number: int | None) -> None:
    """Raise what a run's end means, unless it is the plan's last step."""
    told = end.get("end", {"kind": "ordered"})
    match told["kind"]:
        case "done" if told["step"] == plan.steps and number is None:
            return
        case "done" | "ordered":
            raise StoppedError(_farewell(told.get("step"), number), exit_code=128 + (number or signal.SIGTERM))
        case "stopped":
            raise TrainingError(told["text"])
    cause = told["details"].strip() or f"rank {end['rank']} {told['text']}"
    raise RaytxError(
        f"rank {end['rank']} failed, and no restart is left (scaling.max_failures={plan.recipe.scaling.max_failures}). "
        f"The first cause:\n{cause}\nThe same command goes on from the last checkpoint"
    )


def _farewell(step: int | None, number: int | None) -> str:
    why = signal.Signals(number).name if number else "an order"
    if step is None:
        return f"stopped by {why}, with nothing saved since the last checkpoint; the same command goes on from there"
    return f"stopped by {why} at step {step}, with a checkpoint of it; the same command goes on from there"


class TellFailures(UserCallback):  # type: ignore[misc]
    """Tells the supervisor why Ray Train replaces workers, when it happens."""

    def __init__(self, supervisor: Any) -> None:
        self._supervisor = supervisor

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        rank, error = first_cause(worker_exceptions)
        self._supervisor.lost.remote(f"the worker of rank {rank} failed ({_gist(error)})", rank=rank)


def first_cause(failures: Mapping[int, Exception]) -> tuple[int, Exception]:
    """Return the failure that brought the others about: a worker that died, then the lowest rank's error."""
    return min(failures.items(), key=lambda item: (not _died(item[1]), item[0]))


def _died(error: Exception) -> bool:
    return isinstance(getattr(error, "health_check_failure", error), ray.exceptions.RayActorError)


def _gist(error: Exception) -> str:
    """Return an error in a line: its last one, where Ray puts what happened, if not how to wait longer for it."""
    if _died(error):
        return "its process died"
    lines = [line.strip() for line in str(error).strip().splitlines() if not line.startswith("You can set the timeout")]
    return lines[-1] if lines else type(error).__name__


# --------------------------------------------------------------------------------------- while a run goes on


@contextlib.contextmanager
def _relayed(supervisor: Any, display: Display, run_dir: Path) -> Iterator[None]:
    """Show the supervisor's records while the block runs, and what is left at its end; remarks stay on record."""
    done = threading.Event()

    def relay() -> None:
        while not done.wait(RELAY_S):
            with contextlib.suppress(ray.exceptions.RayError):
                show(ray.get(supervisor.drain.remote(), timeout=10))

    def show(records: list[Record]) -> None:
        for record in records:
            if record["kind"] == "remark":
                status.remark(run_dir, record["text"])
            with contextlib.suppress(Exception, SystemExit):  # rich exits where nobody reads any more
                display.show(record)

    thread = threading.Thread(target=relay, name="raytx-journal", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)
        with contextlib.suppress(ray.exceptions.RayError):
            show(ray.get(supervisor.drain.remote(), timeout=10))


def _interruptible(
    work: Callable[[], dict[str, Any]], supervisor: Any, console: Console
) -> tuple[dict[str, Any], int | None]:
    """Work in a thread; return what came of it, and the signal that ended it early.

    The first Ctrl-C, or a SIGTERM, has the ranks save and end; another Ctrl-C ends everything at once. In a thread of
    its own Ray Train takes no signals for itself. Where this is not the main thread, none can be taken.
    """
    if threading.current_thread() is not threading.main_thread():
        return work(), None
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        if len(asked) > 1:
            return
        supervisor.order.remote("stop")
        with contextlib.suppress(Exception, SystemExit):  # rich exits where nobody reads any more; the run must save
            console.print("saving a checkpoint, then stopping; Ctrl-C once more stops at once", highlight=False)

    def remind() -> None:  # a supervisor that was replaced knows of no order
        if asked:
            supervisor.order.remote("stop")

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        return _in_thread(work, meanwhile=remind), asked[0] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_thread(work: Callable[[], dict[str, Any]], *, meanwhile: Callable[[], None]) -> dict[str, Any]:
    """Return what `work` returns, or raise what it raises, leaving this thread free for signals meanwhile."""
    future: Future[dict[str, Any]] = Future()

    def carry_out() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=carry_out, name="raytx-train", daemon=True).start()
    while True:
        with contextlib.suppress(TimeoutError):
            return future.result(timeout=0.5)  # an untimed wait would keep signals waiting on some systems
        meanwhile()


def _configure() -> None:
    """Poll workers often enough that a run ends when it is done; keep Ray's own words out of the user's."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # All keepers make a report within moments. Where one does not, as a new supervisor knows of no report that the old
    # one granted, the others would by Ray's default wait for ever.
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", "120")
    # a group asks only for places that were free a moment ago
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(START_TIMEOUT_S)
    # Ray's watcher would keep ranks on a drained node until it goes; raytx.elastic moves them at once
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    if not os.environ.get("RAYTX_VERBOSE"):
        logging.getLogger("ray.train").setLevel(logging.ERROR)
