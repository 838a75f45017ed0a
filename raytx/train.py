"""Train a recipe: one Ray Train run from prepared data to committed checkpoints, then artifacts and a report."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console

from raytx import checkpoint, cluster, run, worker
from raytx.errors import RaytxError, RecipeError, TrainingError
from raytx.export import Exported, published
from raytx.export import export as export_checkpoint
from raytx.journal import Display, Journal
from raytx.plan import Plan, resolve
from raytx.prepare import Prepared, prepare
from raytx.recipe import Recipe, load
from raytx.rendezvous import AddressedTorchConfig, FileTorchConfig
from raytx.report import write_report

QUEUE_LIMIT = 10_000
"""Records that may wait for the driver; more are dropped, oldest first, rather than slow a step down."""
FLUSH_S = 0.2
FLUSH_LIMIT_S = 10.0
COLLECTIVE_TIMEOUT_S = 600


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    run_dir: Path
    steps: int
    metrics: dict[str, float]
    """The evaluation of the chosen checkpoint."""
    checkpoint: Path
    artifacts: dict[str, Path] = field(default_factory=dict)
    """Artifact directory of each export type."""


def train(
    recipe: Recipe | str | Path,
    *,
    overrides: Sequence[str] = (),
    address: str | None = None,
    verbose: bool = False,
    console: Console | None = None,
) -> Result:
    """Train a recipe, or continue its run, and publish its artifacts.

    Starts a local Ray on loopback, or joins the cluster at `address`. Raises RaytxError for what a user can mend.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe, overrides)
    return fit(resolve(recipe), address=address, verbose=verbose, console=console or Console())


def fit(
    plan: Plan,
    *,
    address: str | None = None,
    verbose: bool = False,
    callbacks: Sequence[UserCallback] = (),
    console: Console | None = None,
    export: bool = True,
) -> Result:
    """Carry a plan out. Ray is started, or joined at `address`, once the data is known to be good."""
    console = console or Console(quiet=True)
    with run.own(plan) as run_dir:
        plan, prepared = prepare(plan, console)
        run.record(plan)
        _announce(plan, prepared, console)
        if _finished(plan):
            console.print(f"finished already, at step {plan.steps}; to train anew give it another name (name=...)")
        else:
            _connect(plan, address, verbose, console)
            _run_workers(plan, callbacks, console)
        chosen = checkpoint.chosen(run_dir, plan)
        result = Result(run_dir, chosen.step, chosen.state.metrics, chosen.directory)
        if export and plan.recipe.export:
            result = replace(result, artifacts=_artifacts(chosen.directory, plan, address, verbose, console))
        write_report(run_dir)
        return result


def _connect(plan: Plan, address: str | None, verbose: bool, console: Console) -> None:
    """Have a cluster, and wait until it has room for the plan's workers."""
    with console.status("starting Ray"):
        cluster.connect(address, verbose=verbose)
    cluster.wait_for(
        plan.resources_per_worker,
        num_workers=plan.world_size,
        wait_s=plan.recipe.scaling.wait_s,
        console=console,
        placement_strategy=plan.recipe.scaling.placement_strategy,
    )


def _artifacts(directory: Path, plan: Plan, address: str | None, verbose: bool, console: Console) -> dict[str, Path]:
    """Return a checkpoint's artifacts; what is there already, and whole, is not made again."""
    if (there := published(directory, plan)) is not None:
        return there
    with console.status("starting Ray"):
        cluster.connect(address, verbose=verbose)
    return _export(directory, plan, console)


def _export(directory: Path, plan: Plan, console: Console) -> dict[str, Path]:
    """Export in a process of its own on the cluster: it may need more memory than the driver's machine has."""
    environment = _environment(plan)
    task = ray.remote(num_cpus=1, runtime_env={"env_vars": environment}, max_retries=1)(export_checkpoint)
    with console.status("exporting and replaying golden outputs"):
        try:
            exported: Exported = ray.get(task.remote(directory, plan))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RaytxError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            raise RaytxError(
                f"the process that exported {directory} died: {str(error).strip().splitlines()[0]}"
            ) from error
    exported.show(console)
    return exported.artifacts


def _announce(plan: Plan, prepared: Prepared, console: Console) -> None:
    """Say in one breath what is about to happen."""
    recipe, layout = plan.recipe, plan.layout
    name, values = prepared.baseline["name"], {k: v for k, v in prepared.baseline.items() if k != "name"}
    console.print(f"[bold]{recipe.name}[/]  {plan.run_dir}", highlight=False)
    console.print(
        f"model {recipe.model.type}, {plan.size.parameters:,} parameters{_trained(plan)}; "
        f"{prepared.num_samples['train']:,} training and {prepared.num_samples['test']:,} held-out samples; "
        f"{plan.steps:,} steps of {recipe.train.global_batch_size} samples; strategy {recipe.strategy.type} on "
        f"{layout.world_size} worker{'s' if layout.world_size > 1 else ''}",
        highlight=False,
    )
    for remark in prepared.remarks:
        console.print(f"data: {remark}", style="yellow", highlight=False, markup=False)
    numbers = ", ".join(f"{metric} {value:.4f}" for metric, value in values.items())
    console.print(f"to beat ({name}): {numbers}", highlight=False)


def _trained(plan: Plan) -> str:
    return "" if plan.size.trainable == plan.size.parameters else f", {plan.size.trainable:,} of them trained"


def _finished(plan: Plan) -> bool:
    newest = checkpoint.newest(plan.run_dir)
    return newest is not None and newest.step == plan.steps


def _run_workers(plan: Plan, callbacks: Sequence[UserCallback], console: Console) -> None:
    """Run the worker group to the plan's last step, restarting it as the failure policy says."""
    assert plan.steps is not None
    board = Board.remote()  # type: ignore[attr-defined]
    _quieten()
    with Display(total_steps=plan.steps, console=console) as display, _relayed(board, display), _interruptible():
        state = _result(_trainer(plan, board, callbacks).fit, plan)
    if "stopped" in state:
        raise TrainingError(state["stopped"])


def _trainer(plan: Plan, board: Any, callbacks: Sequence[UserCallback]) -> TorchTrainer:
    recipe = plan.recipe
    return TorchTrainer(
        _worker_main,
        train_loop_config={"plan": plan.to_dict(), "board": board},
        torch_config=_process_group(plan),
        scaling_config=ScalingConfig(
            num_workers=plan.world_size,
            use_gpu=recipe.scaling.use_gpu,
            resources_per_worker=plan.resources_per_worker,
            placement_strategy=recipe.scaling.placement_strategy,
        ),
        run_config=RunConfig(
            # Checkpoints are raytx's own; what Ray keeps of a run is of this attempt alone, so it gets a new name.
            name=f"{int(time.time())}-{os.getpid()}",
            storage_path=str(plan.run_dir / ".ray"),
            failure_config=FailureConfig(max_failures=recipe.scaling.max_failures, controller_failure_limit=10),
            worker_runtime_env={"env_vars": _environment(plan)},
            callbacks=[TellFailures(board, max_failures=recipe.scaling.max_failures), *callbacks],
        ),
    )


def _process_group(plan: Plan) -> TorchConfig:
    backend = "nccl" if plan.recipe.scaling.use_gpu else "gloo"
    if cluster.started_here():
        return FileTorchConfig(backend=backend, timeout_s=COLLECTIVE_TIMEOUT_S, directory=str(plan.run_dir / ".ray"))
    return AddressedTorchConfig(backend=backend, timeout_s=COLLECTIVE_TIMEOUT_S)


def _environment(plan: Plan) -> dict[str, str]:
    """Return the environment variables of this plan's processes, which must be set before they import torch."""
    scaling = plan.recipe.scaling
    return {
        "OMP_NUM_THREADS": str(scaling.threads_per_worker),
        "TOKENIZERS_PARALLELISM": "false",
        **cluster.passed_on(),
        **plan.recipe.strategy.environment(use_gpu=scaling.use_gpu),
    }


def _worker_main(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on every worker."""
    plan = Plan.from_dict(config["plan"])
    rank = ray.train.get_context().get_world_rank()
    with _Sender(config["board"], plan.run_dir if rank == 0 else None) as sender:
        session = worker.Session(
            rank=rank,
            log=sender.log,
            flush=sender.flush,
            report=lambda metrics: ray.train.report(dict(metrics)),
            node=cluster.node_name(ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()),
        )
        try:
            return {"step": worker.train(plan, session).step}
        except (TrainingError, RecipeError) as stop:  # every rank meets the same; a restart would only repeat it
            return {"stopped": str(stop)}
        except Exception as error:
            error.add_note(traceback.format_exc())  # a traceback does not travel with its exception, a note does
            raise


def _result(fit: Callable[[], Any], plan: Plan) -> dict[str, Any]:
    """Run Ray Train and return rank 0's result; turn its failures into one clear error, the first cause first."""
    from ray.train import TrainingFailedError, WorkerGroupError

    try:
        state: dict[str, Any] = fit().return_value or {}
        return state
    except WorkerGroupError as error:
        rank, cause = first_cause(error.worker_failures)
        if (original := _original(cause)) is not None:
            raise original from None
        raise RaytxError(
            f"worker {rank} failed, and again after {plan.recipe.scaling.max_failures} restarts "
            f"(scaling.max_failures). The first cause:\n{_told(cause)}\n"
            "The same command goes on from the last checkpoint"
        ) from error
    except TrainingFailedError as error:
        raise RaytxError(f"Ray Train gave up: {error}") from error


def _told(cause: BaseException) -> str:
    return "\n".join(getattr(cause, "__notes__", [])).strip() or str(cause)


def _original(error: BaseException) -> RaytxError | None:
    """Find the RaytxError that a worker raised below the layers that carried it here."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RaytxError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return None


# ------------------------------------------------------------------------------- records from workers to the driver


@ray.remote(num_cpus=0)
class Board:
    """Where rank 0 leaves records and the driver collects them; ray.train.report would cost seconds a call."""

    def __init__(self) -> None:
        self._records: list[worker.Record] = []

    def push(self, records: list[worker.Record]) -> None:
        self._records = (self._records + records)[-QUEUE_LIMIT:]

    def drain(self) -> list[worker.Record]:
        records, self._records = self._records, []
        return records


class TellFailures(UserCallback):  # type: ignore[misc]
    """Tells the user why workers are restarted, when it happens."""

    def __init__(self, board: Any, *, max_failures: int) -> None:
        self._board, self._left = board, max_failures

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        rank, error = first_cause(worker_exceptions)
        then = "restarting all workers from the last checkpoint" if self._left else "no restart is left"
        self._left -= 1
        self._board.push.remote([{"kind": "remark", "text": f"worker {rank} failed ({_gist(error)}); {then}"}])


def first_cause(failures: Mapping[int, Exception]) -> tuple[int, Exception]:
    """Return the failure that brought the others about: a worker that died, then the lowest rank's error.

    When a process dies, the others fail with a broken connection, which tells nothing.
    """
    return min(failures.items(), key=lambda item: (not isinstance(item[1], ray.exceptions.RayActorError), item[0]))


def _gist(error: Exception) -> str:
    """Return an error in a line: its last one, where Ray and torch put what happened."""
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process died"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()


class _Sender:
    """Takes rank 0's records without blocking a step; a thread writes them to the journal and tells the driver."""

    def __init__(self, board: Any, run_dir: Path | None) -> None:
        self._board, self._run_dir = board, run_dir
        self._waiting: queue.Queue[worker.Record] = queue.Queue(QUEUE_LIMIT)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._carry, name="raytx-log", daemon=True)

    def __enter__(self) -> _Sender:
        if self._run_dir is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self._run_dir is not None:
            self._thread.join(timeout=10)

    def log(self, record: worker.Record) -> None:
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(record)

    def flush(self) -> None:
        """Wait until what was logged so far is on disk, but not for a disk that does not answer."""
        deadline = time.monotonic() + FLUSH_LIMIT_S
        while self._waiting.unfinished_tasks and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(0.01)

    def _carry(self) -> None:
        assert self._run_dir is not None
        with Journal(self._run_dir) as journal:
            while not (self._done.wait(FLUSH_S) and self._waiting.empty()):
                if records := [self._waiting.get_nowait() for _ in range(self._waiting.qsize())]:
                    self._deliver(records, journal)
                    for _ in records:
                        self._waiting.task_done()

    def _deliver(self, records: list[worker.Record], journal: Journal) -> None:
        """A journal that cannot be written, or a driver that is gone, must not stop the training."""
        if (problem := journal.take(records)) is not None:
            records = [*records, {"kind": "remark", "text": f"metrics cannot be written: {problem}"}]
        with contextlib.suppress(ray.exceptions.RayError):
            self._board.push.remote(records)


@contextlib.contextmanager
def _relayed(board: Any, display: Display) -> Iterator[None]:
    """Show the board's records while the block runs, and what is left at its end."""
    done = threading.Event()

    def relay() -> None:
        while not done.wait(FLUSH_S):
            with contextlib.suppress(ray.exceptions.RayError):
                show(ray.get(board.drain.remote(), timeout=10))

    def show(records: list[worker.Record]) -> None:
        for record in records:
            display.show(record)

    thread = threading.Thread(target=relay, name="raytx-journal", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)
        with contextlib.suppress(ray.exceptions.RayError):
            show(ray.get(board.drain.remote(), timeout=10))


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the run as it ends any program, and put back the handler that Ray Train leaves replaced."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:  # Ray Train's answer to Ctrl-C
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, handler)


def _quieten() -> None:
    """Poll workers often enough that a run ends when it is done; keep Ray's own words out of the user's."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "180")
    if not os.environ.get("RAYTX_VERBOSE"):
        logging.getLogger("ray.train").setLevel(logging.ERROR)
