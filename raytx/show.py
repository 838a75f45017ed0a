"""Show a plan to a person: values and their origin, batch arithmetic, rank grid, settings, bytes, placement."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raytx.memory import save_bytes
from raytx.plan import Plan, strategy_settings

MAX_RANKS_SHOWN = 64
MAX_REASONS_SHOWN = 8


def show_plan(plan: Plan, console: Console, *, nodes: Sequence[str] | None = None) -> None:
    """Print everything that `raytx train` would do, top to bottom in the order in which it happens.

    `nodes` names the node of each rank, where a cluster was asked.
    """
    console.print(f"[bold]{plan.recipe.name}[/] -> {plan.run_dir}\n", highlight=False, soft_wrap=True)
    console.print(_values(plan))
    console.print(f"\n[bold]batch[/]      {_batch(plan)}", highlight=False)
    console.print(f"[bold]steps[/]      {_steps(plan)}", highlight=False)
    console.print(f"[bold]placement[/]  {_placement(plan)}\n", highlight=False)
    if plan.recipe.scaling.elastic:
        _show_sizes(plan, console)
    console.print(_grid(plan, nodes))
    console.print()
    console.print(_memory(plan))
    if settings := strategy_settings(plan):
        console.print(f"\n[bold]{plan.recipe.strategy.type} settings[/]")
        console.print(_settings(settings))


def _values(plan: Plan) -> Table:
    table = Table(box=None, header_style="bold", title=None)
    for title in ("key", "value", "from"):
        table.add_column(title, overflow="fold")
    for path, value in _leaves(plan.recipe.dump()):
        origin = plan.origins.get(path) or plan.origins.get(path.rpartition(".")[0], "default")
        style = "" if origin == "default" else "bold"
        table.add_row(path, escape(json.dumps(value, ensure_ascii=False)), origin, style=style)
    return table


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for place, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{place}")
    else:
        yield path, value


def _batch(plan: Plan) -> str:
    train, ranks = plan.recipe.train, plan.layout.data_parallel_size
    return (
        f"{train.global_batch_size} samples = {train.micro_batch_size} micro x {plan.gradient_accumulation_steps} "
        f"accumulation x {ranks} data-parallel ranks; at most {train.global_batch_size * train.max_length:,} tokens"
    )


def _steps(plan: Plan) -> str:
    if plan.steps is None:
        return f"{plan.recipe.train.epochs or 1:g} epochs; counted when the data is prepared"
    return f"{plan.steps:,}, warm-up {plan.warmup_steps:,}, learning rate {plan.recipe.optim.schedule}"


def _placement(plan: Plan) -> str:
    bundle = ", ".join(f"{name}: {amount:g}" for name, amount in plan.resources_per_worker.items())
    count = f"{plan.sizes[0]} to {plan.sizes[-1]}" if plan.elastic else plan.world_size
    return f"{count} bundles of {{{bundle}}}, {plan.recipe.scaling.placement_strategy}"


def _show_sizes(plan: Plan, console: Console) -> None:
    """Show what every number of workers comes to, and why some will not do."""
    table = Table(box=None, header_style="bold")
    for title in ("workers", "data-parallel ranks", "accumulation", "bytes per rank"):
        table.add_column(title, justify="right")
    for row in sizes(plan):
        table.add_row(*(f"{value:,}" for value in row.values()))
    console.print(table)
    unusable = plan.unusable()
    for count, reason in list(unusable.items())[:MAX_REASONS_SHOWN]:
        console.print(f"never on {count}: {reason}", highlight=False, markup=False, soft_wrap=True)
    if (rest := len(unusable) - MAX_REASONS_SHOWN) > 0:
        console.print(f"never on {rest} more, for the like reasons", highlight=False)
    console.print(f"\n[bold]on {plan.world_size} workers[/]", highlight=False)


def sizes(plan: Plan) -> list[dict[str, int]]:
    """Return what the numbers of workers that a plan can run on come to: the bytes are those of the fullest rank."""
    return [
        {
            "workers": count,
            "data_parallel_size": at.layout.data_parallel_size,
            "gradient_accumulation_steps": at.gradient_accumulation_steps,
            "bytes_per_rank": max(stage.total for stage in at.memory),
        }
        for count in plan.sizes
        for at in [plan.on(count)]
    ]


def _grid(plan: Plan, nodes: Sequence[str] | None) -> Table:
    """The grid as Ray numbers ranks: consecutive ranks share a node. Which one, only a cluster can tell."""
    table = Table(box=None, header_style="bold")
    if nodes:
        table.add_column("node")
    for title in ("rank", "pipeline", "data", "sequence", "tensor"):
        table.add_column(title, justify="right")
    table.add_column("holds")
    table.add_column("bytes", justify="right")
    for rank in range(min(plan.world_size, MAX_RANKS_SHOWN)):
        place = plan.layout.coordinate(rank)
        numbers = (rank, place.pipeline, place.data, place.sequence, place.tensor)
        memory = plan.memory[place.pipeline if plan.stages else 0]
        table.add_row(
            *nodes[rank : rank + 1] if nodes else (),
            *map(str, numbers),
            held(plan, place.pipeline),
            f"{memory.total:,}",
        )
    if plan.world_size > MAX_RANKS_SHOWN:
        table.add_row("...")
    return table


def held(plan: Plan, stage: int) -> str:
    """Return in words which part of the model the ranks of a pipeline stage hold."""
    if not plan.stages:
        return "all layers"
    first, last = plan.stages[stage]
    head = len(plan.size.pieces) - 1  # the embedding is piece 0, layer n is piece n + 1
    layers = range(max(first, 1) - 1, min(last, head) - 1)
    parts = ["embedding"] if first == 0 else []
    if layers:
        parts.append(f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}")
    return ", ".join(parts + (["head"] if last > head else []))


def _memory(plan: Plan) -> Table:
    """Bytes of a rank; of a rank of each stage, where the model is cut for a pipeline."""
    table = Table(box=None, header_style="bold")
    table.add_column("bytes per rank")
    for stage in range(len(plan.memory)):
        table.add_column(f"stage {stage}" if plan.stages else "bytes", justify="right")
    for name in plan.memory[0].to_dict():
        amounts = [f"{memory.to_dict()[name]:,}" for memory in plan.memory]
        table.add_row("activations (estimate)" if name == "activations" else name, *amounts)
    if plan.recipe.save.background:
        held = save_bytes(plan.size, world_size=plan.world_size, optim=plan.recipe.optim)
        table.add_row("on the host, during a save", *[f"{held:,}"] * len(plan.memory))
    return table


def _settings(settings: dict[str, tuple[Any, str]]) -> Table:
    table = Table(box=None, header_style="bold")
    for title in ("key", "value", "from"):
        table.add_column(title, overflow="fold")
    for key, (value, origin) in settings.items():
        table.add_row(key, escape(json.dumps(value)), escape(origin))
    return table
