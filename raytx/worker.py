"""The training loop of one rank: build from the plan, restore, then step, evaluate and save to the end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from raytx import checkpoint, mirror, nonfinite, pulse
from raytx.artifact import Golden
from raytx.batches import Batches, evaluation_batches, spread
from raytx.checkpoint import State
from raytx.components import Engine, Microbatch
from raytx.errors import TrainingError
from raytx.files import read_json
from raytx.ledger import Ledger
from raytx.plan import Plan
from raytx.prepare import META, Prepared, Samples, bring
from raytx.saving import Saver
from raytx.seeding import seed_generators
from raytx.tasks.base import Task

GOLDEN_SAMPLES = 4
DEMO_SAMPLES = 3
COUNCIL_S = 0.5
"""How often ranks ask each other whether anybody was told to save or to stop."""
Record = dict[str, Any]


@dataclass(frozen=True, order=True)
class Order:
    """What is asked of a running group from outside. The highest number is the one that counts."""

    number: int = 0
    kind: Literal["", "save", "stop"] = ""
    """save: commit a checkpoint now and go on. stop: commit one and end."""


@dataclass(frozen=True)
class Session:
    """What the loop needs of the outside. Ray stands behind it in a run; tests put lists there."""

    rank: int
    log: Callable[[Record], None]
    """Take a record for metrics.jsonl; must not block, except for the ledger's. Called on rank 0 only."""
    flush: Callable[[], None]
    """Return when what was logged is on disk, or raise OSError. Called on rank 0 before a checkpoint, from a thread."""
    report: Callable[[dict[str, float]], None]
    """Take an evaluation's metrics. Called by every rank, equally often: Ray Train requires it."""
    node: str = ""
    """Where this rank runs, for people."""
    order: Callable[[], Order] = Order
    """Return the latest order that reached this rank; ranks may hear it at different moments."""
    saved: int = 0
    """Step of a checkpoint that is known to have been committed: a run that has lost it must not begin anew."""


def train(plan: Plan, session: Session) -> State:
    """Train one rank's part of a plan to its last step, or until it is told to stop; return the state that was saved
    last, the same on every rank."""
    bring(plan)
    prepared = _prepared(plan)
    model = plan.recipe.model.build()
    task = model.task(prepared.processor)
    strategy = plan.recipe.strategy.build()
    seed_generators(plan.recipe.train.seed)
    module = structure(plan)
    weights = model.weights(prepared.processor, seed=plan.recipe.train.seed)
    promised = checkpoint.promised(module, plan.recipe.optim)
    engine = strategy.engine(module, model=model, weights=weights, plan=plan, rank=session.rank)
    batches = Batches(plan, task, prepared.samples("train"), dp_rank=plan.layout.dp_rank(session.rank))
    saver = Saver(engine, plan, rank=session.rank, promised=promised, log=session.log, flush=session.flush)
    loop = _Loop(plan, session, task, engine, batches, prepared.samples("test"), saver)
    pulse.phase("restore")
    state = restore(engine, plan, session)
    pulse.at(state.step)
    places = engine.gather((session.node, os.getpid()))
    if session.rank == 0:
        nodes, pids = zip(*places, strict=True)
        session.log({"kind": "placed", "step": state.step, "nodes": nodes, "pids": pids})
    if session.rank == 0 and state.step == 0:
        session.log({"kind": "started", "step": 0})
        session.log({"kind": "baseline", "step": 0, **prepared.baseline})
    return loop.run(state)


def _prepared(plan: Plan) -> Prepared:
    return Prepared(directory=plan.data_dir, **read_json(plan.data_dir / META))


def structure(plan: Plan) -> Any:
    """Return the module that a plan trains, without its numbers."""
    module = plan.recipe.model.build().structure(
        _prepared(plan).processor, activation_checkpointing=plan.recipe.train.activation_checkpointing
    )
    for step in plan.recipe.compression:
        module = step.build().prepare(module)
    return module


def restore(engine: Engine, plan: Plan, session: Session) -> State:
    """Load the newest complete checkpoint into the engine, the same on every rank; a fresh state when there is none."""
    mirrored = mirror.of(plan)
    newest = mirrored.newest if mirrored else partial(checkpoint.newest, plan.run_dir, set_aside=True)
    source = newest(
        tell=(lambda text: session.log({"kind": "remark", "text": text})) if session.rank == 0 else None,
        rank=session.rank,
        gather=engine.gather,
    )
    if source is None:
        _check_fresh(plan, session, engine)
        return State()
    engine.load_tensors(source.read, step=source.step - source.state.nonfinite)
    engine.load_scalars(source.state.scalars)
    if session.rank == 0:
        session.log({"kind": "resumed", "step": source.step, "checkpoint": source.directory.name})
    state = source.state
    return state if state.metric == _metric(plan) else replace(state, metric=None, best=None, best_step=None)


def _check_fresh(plan: Plan, session: Session, engine: Engine) -> None:
    """Refuse to begin anew where there was a checkpoint: it would overwrite the record of a run that may be mended."""
    directory = plan.run_dir / "checkpoints"
    left = sorted(path.name for path in directory.glob("*step-*") if not path.name.startswith("."))
    (left, *_), saved = engine.gather(left), session.saved
    if left or saved:
        what = f"a checkpoint of step {saved}" if saved else f"checkpoints ({', '.join(left[:3])})"
        raise TrainingError(
            f"{plan.run_dir}: held {what}, and now none that is whole. Is the storage there, as it was? Bring it back "
            "and run the same command again, or begin anew under another name (name=...)"
        )


def _metric(plan: Plan) -> str:
    return f"{plan.metric} {plan.metric_mode}"


class _Loop:
    """The moving parts of one attempt."""

    def __init__(
        self,
        plan: Plan,
        session: Session,
        task: Task,
        engine: Engine,
        batches: Batches,
        held_out: Samples,
        saver: Saver,
    ) -> None:
        self.plan, self.session, self.task, self.engine = plan, session, task, engine
        self.batches, self.held_out, self.saver = batches, held_out, saver
        self.shown = held_out if len(held_out) else batches.samples
        self.ledger = Ledger(speaks=_speaks(plan, session.rank)) if plan.recipe.train.ledger else None
        self.council, self.recess = Council(engine, session, saver), Council(engine, session, saver)

    def run(self, state: State) -> State:
        """Do the steps that are left, and wait until what is being saved is committed."""
        try:
            state = self.steps(state)
        except TrainingError:  # every rank meets it at the same step, so what is being saved can still be committed
            self.saver.wait()
            raise
        self.saver.wait()
        pulse.phase("end")
        return state

    def steps(self, state: State) -> State:
        """Do the steps that are left, or those until the run is told to end."""
        assert self.plan.steps is not None
        if state.step and not state.metrics and self._evaluates(state.step):
            state = self.settle(state)  # an order broke into its evaluation
        while state.step < self.plan.steps and not self.stopped:
            state = self.settle(self.step(state))
        return state

    def settle(self, state: State) -> State:
        """Do what follows an update. Evaluation comes before saving, so that a checkpoint knows its own metrics."""
        if self.ledger is not None and self.ledger.is_full:
            self.tell_fed()
        if self._evaluates(state.step):
            state = self.evaluate(state)
        ordered = self.council.meet()
        self.recess.heard = max(self.recess.heard, self.council.heard)  # what is obeyed here is no news there
        if ordered or self.stopped or self._saves(state):
            self.save(state)
        return state

    @property
    def stopped(self) -> bool:
        """Whether this run was told to end, at a step or in the midst of an evaluation."""
        return "stop" in (self.council.heard.kind, self.recess.heard.kind)

    def _evaluates(self, step: int) -> bool:
        return len(self.held_out) > 0 and self._due(self.plan.recipe.evaluate.every, step)

    def _saves(self, state: State) -> bool:
        return self._due(self.plan.recipe.save.every, state.step) or self._is_best(state)

    def _is_best(self, state: State) -> bool:
        """The best checkpoint is the one that gets published, so it is saved whenever it is found."""
        return self.plan.recipe.save.keep == "best" and state.best_step == state.step

    def step(self, state: State) -> State:
        """Do one optimizer update and log it."""
        started = time.monotonic()
        lr = self.plan.lr(state.step)
        pulse.phase("data")
        microbatches = self.batches.microbatches(state.step)
        pulse.phase("forward")
        metrics = self.engine.train_batch(microbatches, lr=lr)
        seconds = time.monotonic() - started
        step = state.step + 1
        done = replace(state, step=step, metrics={}, seconds=state.seconds + seconds)
        pulse.stepped(step, seconds)
        if self.ledger is not None:
            self.ledger.note(step, microbatches)
        if not nonfinite.is_finite(metrics):
            return self.leave_out(done, metrics, microbatches)
        if self.session.rank == 0:
            tokens = self.batches.tokens(state.step)
            samples = len(self.batches.indices(state.step))
            self.session.log(
                {"kind": "step", "step": step, "epoch": round(step / (self.plan.steps_per_epoch or 1), 4), **metrics}
                | {"lr": lr, "tokens_per_s": tokens / seconds, "samples_per_s": samples / seconds, "seconds": seconds}
            )
        return done

    def leave_out(self, state: State, metrics: Record, microbatches: list[Microbatch]) -> State:
        """Count a step that has updated nothing, and say where that came from; raise TrainingError past the limit."""
        state, limit = replace(state, nonfinite=state.nonfinite + 1), self.plan.recipe.train.max_nonfinite
        found = nonfinite.culprits(self.engine, self.batches, microbatches)
        samples = self.batches.indices(state.step - 1).tolist()
        text = nonfinite.account(state.step, metrics, samples, found)
        if state.nonfinite > limit:
            raise TrainingError(
                f"{text}. Training has diverged: such steps are {state.nonfinite} by now, train.max_nonfinite is "
                f"{limit}. Lower optim.lr, lengthen optim.warmup or look at these samples"
            )
        if self.session.rank == 0:
            numbers = {key: str(value) for key, value in metrics.items()}  # JSON has no word for them
            record = {"step": state.step, **numbers, "samples": found or samples, "count": state.nonfinite}
            self.session.log({"kind": "nonfinite", **record})
            told = f"{text}. It is left out, as {state.nonfinite} of at most {limit}"
            self.session.log({"kind": "remark", "step": state.step, "text": told})
        return state

    def evaluate(self, state: State) -> State:
        """Measure the held-out split; remember the best. The state is as it was where the run is told to end."""
        started = time.monotonic()
        metrics = evaluate(
            self.engine,
            self.task,
            self.held_out,
            plan=self.plan,
            rank=self.session.rank,
            pause=lambda: self._told_to_end(state),
        )
        if metrics is None:
            return state
        if self.session.rank == 0:
            self.session.log({"kind": "eval", "step": state.step, **metrics, "seconds": time.monotonic() - started})
        epoch = state.step / (self.plan.steps_per_epoch or 1)
        self.session.report({"step": state.step, "epoch": epoch, **metrics})
        value = metrics[self.plan.metric]
        if self.plan.better(value, state.best):
            state = replace(state, best=value, best_step=state.step, metric=_metric(self.plan))
        return replace(state, metrics=metrics)

    def save(self, state: State) -> None:
        """Have a checkpoint of this moment committed, and those removed that need not stay."""
        since = time.monotonic()
        pulse.phase("checkpoint")
        state = replace(state, scalars=self.engine.scalars())
        self.tell_fed()
        demo = self.task.demo(self.shown[spread(len(self.shown), DEMO_SAMPLES)])
        self.saver.begin(state, golden=self.golden(), demo=demo, since=since)

    def tell_fed(self) -> None:
        """Log which samples all ranks were fed since this was last done; before a checkpoint says that they were."""
        if self.ledger is not None:
            self.ledger.tell(self.engine, self.session.log if self.session.rank == 0 else None)

    def golden(self) -> Golden:
        """Record what the engine answers to a few samples, held-out ones where there are any."""
        features = self.task.golden(self.shown[spread(len(self.shown), GOLDEN_SAMPLES)])
        _, logits = self.engine.eval_batch(Microbatch(features, weight=1.0, seed=0), logits=True)
        return Golden(features, logits if logits is not None else np.zeros(0, dtype=np.float32))

    def _told_to_end(self, state: State) -> bool:
        """Hear orders in the midst of an evaluation; save the state before it where that is asked for."""
        if self.recess.meet() and not self.stopped:
            self.council.heard = self.recess.heard
            self.save(state)
        return self.stopped

    def _due(self, every: int | None, step: int) -> bool:
        return step == self.plan.steps or (every is not None and step % every == 0)


class Council:
    """Ranks ask each other for orders about twice a second, at the same step on each: a collective cheap enough.

    They also tell each other how far the save under way is, which so goes on its way at the same step everywhere.
    Orders reach ranks at different moments, so none may act on what it heard alone. How many steps lie between two
    councils follows from how long they take on the slowest rank.
    """

    def __init__(self, engine: Engine, session: Session, saver: Saver) -> None:
        self._engine, self._session, self._saver = engine, session, saver
        self.heard = Order()
        self._period, self._calls, self._met = 1, 0, time.monotonic()

    def meet(self) -> bool:
        """Return whether an order has come that is to be carried out now. Collective when it is time."""
        self._calls += 1
        if self._calls < self._period:
            return False
        pulse.phase("council")
        pace = (time.monotonic() - self._met) / self._calls
        voices = self._engine.gather((self._session.order(), self._saver.status(), pace))
        orders, statuses, paces = zip(*voices, strict=True)
        self._period = max(1, min(2 * self._period, int(COUNCIL_S / max(*paces, 1e-6))))
        self._calls, self._met = 0, time.monotonic()
        before, self.heard = self.heard, max(orders)
        self._saver.council(statuses)
        return self.heard.number > before.number and bool(self.heard.kind)


def evaluate(
    engine: Engine,
    task: Task,
    samples: Samples,
    *,
    plan: Plan,
    rank: int,
    pause: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Return the task's metrics over a split, from every rank's predictions; equal on all ranks. Collective.

    `pause` is called before each batch; where it returns True, on every rank alike, there are no metrics.
    """
    parts = []
    batches = evaluation_batches(
        task,
        samples,
        micro_batch_size=plan.recipe.train.micro_batch_size,
        dp_rank=plan.layout.dp_rank(rank),
        dp_size=plan.layout.data_parallel_size,
        limit=plan.recipe.evaluate.max_samples,
    )
    for microbatch, targets in batches:
        if pause():
            return None
        pulse.phase("evaluation")
        loss, logits = engine.eval_batch(microbatch, logits=task.needs_logits)
        if targets:
            parts.append(task.evaluation(microbatch.features, loss, logits, targets))
    gathered = engine.gather(parts if _speaks(plan, rank) else [])
    return task.metrics([part for of_rank in gathered for part in of_rank])


def _speaks(plan: Plan, rank: int) -> bool:
    """Tell whether a rank stands for those that share its samples: one of each replica."""
    coordinate = plan.layout.coordinate(rank)
    return not (coordinate.tensor or coordinate.sequence or coordinate.pipeline)
