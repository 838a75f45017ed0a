"""Train a recipe: one Ray Train run from prepared data to committed checkpoints, then artifacts and a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import ray
from ray.train import UserCallback
from rich.console import Console

from raytx import checkpoint, cluster, mirror, run
from raytx.checkpoint import State
from raytx.errors import RaytxError
from raytx.export import Exported, published
from raytx.export import export as export_checkpoint
from raytx.launch import environment, launch
from raytx.plan import Plan, resolve
from raytx.prepare import Prepared, bring, prepare
from raytx.recipe import Recipe, load
from raytx.report import write_report


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
    mirrored = mirror.of(plan)
    held = mirror.held(plan, doing=run.TRAINING, tell=lambda text: console.print(text, style="yellow"))
    with run.own(plan, held) as run_dir:
        plan, prepared = prepare(plan, console)
        run.record(plan)
        if mirrored:
            mirrored.push(mirror.RECORDS)
        _announce(plan, prepared, console)
        if _finished(plan, prepared):
            console.print(f"finished already, at step {plan.steps}; to train anew give it another name (name=...)")
        else:
            _connect(plan, address, verbose, console)
            launch(plan, callbacks=callbacks, console=console)
        chosen = mirrored.chosen(plan) if mirrored else checkpoint.chosen(run_dir, plan)
        result = Result(run_dir, chosen.step, chosen.state.metrics, chosen.directory)
        if export and plan.recipe.export:
            result = replace(result, artifacts=_artifacts(chosen.directory, plan, address, verbose, console))
        if mirrored:
            mirrored.pull(mirror.JOURNAL, grown=True)
        write_report(run_dir)
        return result


def _connect(plan: Plan, address: str | None, verbose: bool, console: Console) -> None:
    """Have a cluster, and wait until it has room for the plan's workers."""
    with console.status("starting Ray"):
        cluster.connect(address, verbose=verbose)
    cluster.wait_for(
        plan.resources_per_worker,
        num_workers=plan.sizes[0],
        wait_s=plan.recipe.scaling.wait_s,
        console=console,
        placement_strategy=plan.recipe.scaling.placement_strategy,
    )


def _artifacts(directory: Path, plan: Plan, address: str | None, verbose: bool, console: Console) -> dict[str, Path]:
    """Return a checkpoint's artifacts; what is there already, and whole, is not made again."""
    if mirrored := mirror.of(plan):
        mirrored.pull_artifacts()
    if (there := published(directory, plan)) is not None:
        return there
    with console.status("starting Ray"):
        cluster.connect(address, verbose=verbose)
    return _export(directory, plan, console)


def _export(directory: Path, plan: Plan, console: Console) -> dict[str, Path]:
    """Export in a process of its own on the cluster: it may need more memory than the driver's machine has."""
    variables = {"env_vars": environment(plan)}
    task = ray.remote(num_cpus=1, runtime_env=variables, max_retries=1)(_exported)
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
    if mirrored := mirror.of(plan):
        mirrored.pull_artifacts()
    return {type_: plan.run_dir / mirror.ARTIFACTS / type_ for type_ in exported.artifacts}


def _exported(directory: Path, plan: Plan) -> Exported:
    """Export a checkpoint where this runs, which of a mirrored run need not be a node that has it."""
    if (mirrored := mirror.of(plan)) is None:
        return export_checkpoint(directory, plan)
    bring(plan)
    exported = export_checkpoint(mirrored.chosen(plan).directory, plan)
    mirrored.push_artifacts()
    return exported


def _announce(plan: Plan, prepared: Prepared, console: Console) -> None:
    """Say in one breath what is about to happen."""
    recipe = plan.recipe
    name, values = prepared.baseline["name"], {k: v for k, v in prepared.baseline.items() if k != "name"}
    mirrored = mirror.of(plan)
    where = f"{mirrored.uri}, here {plan.run_dir}" if mirrored else plan.run_dir
    console.print(f"[bold]{recipe.name}[/]  {where}", highlight=False)
    console.print(
        f"model {recipe.model.type}, {plan.size.parameters:,} parameters{_trained(plan)}; "
        f"{prepared.num_samples['train']:,} training and {prepared.num_samples['test']:,} held-out samples; "
        f"{plan.steps:,} steps of {recipe.train.global_batch_size} samples; strategy {recipe.strategy.type} on "
        f"{_workers(plan)}",
        highlight=False,
    )
    for remark in prepared.remarks:
        console.print(f"data: {remark}", style="yellow", highlight=False, markup=False)
    numbers = ", ".join(f"{metric} {value:.4f}" for metric, value in values.items())
    console.print(f"to beat ({name}): {numbers}", highlight=False)


def _workers(plan: Plan) -> str:
    number = f"{plan.sizes[0]} to {plan.sizes[-1]}" if plan.elastic else str(plan.world_size)
    return f"{number} worker{'s' if plan.sizes[-1] > 1 else ''}"


def _trained(plan: Plan) -> str:
    return "" if plan.size.trainable == plan.size.parameters else f", {plan.size.trainable:,} of them trained"


def _finished(plan: Plan, prepared: Prepared) -> bool:
    """Tell whether the last step is done and measured: an order to stop may have come in between."""
    mirrored = mirror.of(plan)
    if mirrored and mirrored.state().step != plan.steps:
        return False  # so that nothing is fetched for a look
    newest = mirrored.newest() if mirrored else checkpoint.newest(plan.run_dir)
    state = newest.state if newest else State()
    return state.step == plan.steps and bool(state.metrics or not prepared.num_samples["test"])
