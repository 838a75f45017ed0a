"""Show that the numbers do not depend on the machines: the same recipe under several strategies, step by step."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from raytx import storage
from raytx.errors import RaytxError, RecipeError
from raytx.files import write_json
from raytx.journal import METRICS, rows
from raytx.plan import Plan, resolve
from raytx.recipe import Recipe
from raytx.train import fit

STRATEGIES = (
    "single",
    "ddp",
    "fsdp",
    *(f"deepspeed stage={stage}" for stage in range(4)),
    "deepspeed stage=1 tensor_parallel_size=2",
    "deepspeed-3d pipeline_parallel_size=2",
)
"""Compared when none are named; the first is what the others are held to."""
COMPARED = ("loss", "grad_norm")


@dataclass(frozen=True)
class Row:
    """How far one strategy was from the first."""

    strategy: str
    workers: int
    steps: int
    loss: float
    """Largest relative difference of the loss at any step."""
    grad_norm: float
    """Largest relative difference of the gradient norm at any step."""
    last_loss: float


def parity(
    recipe: Recipe,
    *,
    strategies: Sequence[str] = STRATEGIES,
    steps: int = 20,
    limit: float = 1e-5,
    address: str | None = None,
    verbose: bool = False,
    console: Console,
) -> list[Row]:
    """Train a few steps under each strategy; return the table.

    Writes parity.json into the recipe's run directory, where the report finds it. Raises RaytxError, after the table is
    shown and written, when a strategy is further from the first than the limit.
    """
    curves = {}
    for strategy in _possible(recipe, strategies, steps, console):
        with console.status(f"{steps} steps under {strategy}"):
            curves[strategy] = _curve(recipe, strategy, steps, address, verbose)
        console.print(f"{strategy}: {steps} steps, last loss {curves[strategy][-1]['loss']:.6f}", highlight=False)
    reference = next(iter(curves.values()))
    table = [_compare(strategy, curve, reference) for strategy, curve in curves.items()]
    run_dir = resolve(recipe).run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "parity.json", [asdict(row) for row in table])
    console.print(_shown(table))
    console.print(f"written to {run_dir / 'parity.json'}; the run's report shows it", highlight=False, soft_wrap=True)
    if far := [row.strategy for row in table if not max(row.loss, row.grad_norm) <= limit]:
        raise RaytxError(f"{', '.join(far)}: further than {limit:.0e} from {strategies[0]}; see the table above")
    return table


def _possible(recipe: Recipe, strategies: Sequence[str], steps: int, console: Console) -> list[str]:
    """Leave out, aloud, what the plan refuses, unless it was asked for by name."""
    possible = []
    for strategy in strategies:
        try:
            resolve(_under(recipe, strategy, steps=steps))
        except RecipeError as error:
            if strategies is not STRATEGIES or strategy == STRATEGIES[0]:
                raise
            console.print(f"left out: {error}", style="yellow", highlight=False, markup=False)
        else:
            possible.append(strategy)
    return possible


def _curve(recipe: Recipe, strategy: str, steps: int, address: str | None, verbose: bool) -> list[dict[str, Any]]:
    """Train anew under one strategy and return its step rows."""
    plan = resolve(_under(recipe, strategy, steps=steps)).fixed()
    _forget(plan)
    fit(plan, address=address, verbose=verbose, export=False)
    curve = [{**row, "workers": plan.world_size} for row in rows(plan.run_dir / METRICS) if row["kind"] == "step"]
    _forget(plan)
    return curve


def _forget(plan: Plan) -> None:
    shutil.rmtree(plan.run_dir, ignore_errors=True)
    if (store := storage.of(plan.recipe.storage_path)) is not None:
        store.remove_directory(plan.recipe.name)


def _under(recipe: Recipe, strategy: str, *, steps: int) -> Recipe:
    """Return the recipe under another strategy, for a few steps, with nothing but training left."""
    values = _strategy(strategy)
    return recipe.override(
        {
            "name": f"{recipe.name}.{strategy.replace(' ', '-').replace('=', '')}",
            "strategy": values,
            "train.steps": steps,
            "train.epochs": None,
            "export": [],
            "compression": [],
            "evaluate.every": None,
            "save.every": None,
            "save.keep": "last",
            "optim.warmup": recipe.optim.warmup if recipe.optim.warmup < steps else 0.1,
            **({"scaling.num_workers": 1} if values["type"] == "single" else {}),
        }
    )


def _strategy(text: str) -> dict[str, Any]:
    """Read "deepspeed stage=2" as {type: deepspeed, stage: 2}."""
    type_, *settings = text.split()
    pairs = [setting.partition("=") for setting in settings]
    if wrong := [key for key, separator, _ in pairs if not separator]:
        raise RecipeError(f"strategy {text!r}: {wrong[0]!r} must be key=value, as in 'deepspeed stage=2'")
    return {"type": type_, **{key: yaml.safe_load(value) for key, _, value in pairs}}


def _compare(strategy: str, curve: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> Row:
    pairs = list(zip(curve, reference, strict=True))
    far = {
        key: max(abs(ours[key] - theirs[key]) / max(abs(theirs[key]), 1e-12) for ours, theirs in pairs)
        for key in COMPARED
    }
    return Row(
        strategy=strategy,
        workers=curve[0]["workers"],
        steps=len(curve),
        loss=far["loss"],
        grad_norm=far["grad_norm"],
        last_loss=curve[-1]["loss"],
    )


def _shown(table: Sequence[Row]) -> Table:
    shown = Table(box=None, header_style="bold")
    for title in ("strategy", "workers", "steps", "last loss", "loss differs by", "gradient norm by"):
        shown.add_column(title, justify="left" if title == "strategy" else "right")
    for row in table:
        shown.add_row(
            row.strategy,
            str(row.workers),
            str(row.steps),
            f"{row.last_loss:.6f}",
            f"{row.loss:.1e}",
            f"{row.grad_norm:.1e}",
        )
    return shown
