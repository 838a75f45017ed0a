"""Resolve a recipe into a plan: defaults filled, batch arithmetic done, combinations checked, memory estimated.

The plan is plain data. It is what `raytx plan` prints, what workers receive and what every checkpoint and artifact
carries as its lineage. Nothing after this module opens the recipe file again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from raytx import __version__, optimizer, schedule, storage
from raytx.components import Component, ModelSize, StrategyConfig
from raytx.errors import PluginError, RaytxError, RecipeError, ResourceError, did_you_mean
from raytx.files import digest
from raytx.layout import Layout
from raytx.memory import Memory, estimate, estimate_stages, save_bytes
from raytx.recipe import Recipe, parse
from raytx.registry import registry

CACHE = ".cache"
"""Directory beside those of runs that holds prepared data."""


@dataclass(frozen=True)
class Plan:
    """A resolved recipe. `recipe` holds every value; the rest is derived from it."""

    recipe: Recipe
    layout: Layout
    gradient_accumulation_steps: int
    resources_per_worker: dict[str, float]
    metric: str
    metric_mode: Literal["min", "max"]
    plugins: dict[str, str]
    """Version of each plugin's distribution; workers refuse another."""
    size: ModelSize
    memory: tuple[Memory, ...]
    """Bytes that one rank holds: of each pipeline stage, where there are any."""
    stages: tuple[tuple[int, int], ...] = ()
    """Pieces [first, last) of the model that each pipeline stage holds; empty where nothing is cut."""
    sizes: tuple[int, ...] = ()
    """Numbers of workers, rising, on which the plan can be carried out; this one is for one of them, see `on`."""
    origins: dict[str, str] = field(default_factory=dict)
    """Where each value of the recipe came from: recipe, override or default."""
    steps: int | None = None
    """Optimizer updates; None until the data is prepared, when it is given in epochs."""
    steps_per_epoch: int | None = None
    num_samples: int | None = None
    prepared: str | None = None
    """Directory of the prepared data, on the driver's node; see data_dir."""
    content: str | None = None
    """Name of what the prepared data holds, whichever version prepared it and wherever it is."""
    version: str = __version__

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def elastic(self) -> bool:
        """Whether workers may come and go: Ray Train is to be given more than one size."""
        return len(self.sizes) > 1

    def on(self, num_workers: int) -> Plan:
        """Return the same plan on another of its sizes: grid, accumulation, stages and bytes anew, all else as it is.

        From the plan alone: a worker calls it when it is told how many there are.
        """
        return replace(self, **_spread(self.recipe, self.size, num_workers))

    def fixed(self) -> Plan:
        """Return the plan for this size and no other."""
        return replace(self, sizes=(self.world_size,))

    def unusable(self) -> dict[int, str]:
        """Return why the plan cannot be carried out on the other numbers of workers in the recipe's range."""
        scaling = self.recipe.scaling
        others = set(range(scaling.min_workers, scaling.max_workers + 1)) - set(self.sizes)
        return {count: str(_refused(self.recipe, self.size, count)) for count in sorted(others)}

    @property
    def run_dir(self) -> Path:
        """The run's directory on this node; of a storage path that is a URI it is a cache, see mirror.py."""
        return storage.directory(self.recipe.storage_path) / self.recipe.name

    @property
    def data_dir(self) -> Path:
        """Where the prepared data is on this node."""
        assert self.prepared is not None
        prepared = Path(self.prepared)
        return self.run_dir.parent / CACHE / prepared.name if storage.is_uri(self.recipe.storage_path) else prepared

    @property
    def warmup_steps(self) -> int:
        return schedule.warmup_steps(self.recipe.optim, steps=self.steps or 0)

    def lr(self, step: int) -> float:
        """Return the learning rate of an update, counted from 0; what falls reaches its floor after the last one."""
        assert self.steps is not None
        return schedule.lr(self.recipe.optim, step, steps=self.steps, warmup=self.warmup_steps)

    def better(self, value: float, than: float | None) -> bool:
        """Tell whether a value of the metric beats another; any number beats none, and nan beats nothing."""
        if not math.isfinite(value):
            return False
        return than is None or (value < than if self.metric_mode == "min" else value > than)

    def with_data(self, *, directory: Path, num_samples: int, content: str | None = None) -> Plan:
        """Return the plan with what the prepared data settles: steps an epoch and steps in all."""
        per_epoch = math.ceil(num_samples / self.recipe.train.global_batch_size)
        steps = self.recipe.train.steps or max(1, round((self.recipe.train.epochs or 1.0) * per_epoch))
        _check_schedule(self.recipe, steps)
        settled = replace(self, steps=steps, steps_per_epoch=per_epoch, num_samples=num_samples)
        return replace(settled, prepared=str(directory), content=content)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data from which `from_dict` makes an equal plan."""
        return {
            "version": self.version,
            "recipe": self.recipe.dump(),
            "layout": asdict(self.layout),
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "resources_per_worker": self.resources_per_worker,
            "metric": self.metric,
            "metric_mode": self.metric_mode,
            "plugins": self.plugins,
            "size": asdict(self.size),
            "memory": [asdict(stage) for stage in self.memory],
            "stages": self.stages,
            "sizes": self.sizes,
            "origins": self.origins,
            "steps": self.steps,
            "steps_per_epoch": self.steps_per_epoch,
            "num_samples": self.num_samples,
            "prepared": self.prepared,
            "content": self.content,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Rebuild a plan, in a worker for example; raise PluginError where a plugin differs from the plan's."""
        check_plugins(data["plugins"])
        return cls(
            **{
                **data,
                "recipe": parse(data["recipe"], where="plan"),
                "layout": Layout(**data["layout"]),
                "size": ModelSize(**{**data["size"], "pieces": tuple(data["size"]["pieces"])}),
                "memory": tuple(Memory(**stage) for stage in data["memory"]),
                "stages": tuple((first, last) for first, last in data["stages"]),
                "sizes": tuple(data.get("sizes", ())),  # a checkpoint may be older
            }
        )

    def identity(self) -> dict[str, Any]:
        """Return the values of the recipe that decide the numbers."""
        return identity(self.recipe.dump())

    def fingerprint(self) -> str:
        return digest(self.identity())


INDIFFERENT = frozenset({"activation_checkpointing", "max_nonfinite", "ledger"})
"""Keys of the section train that decide no numbers."""


def identity(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a dumped recipe that decide the numbers: two that agree on them continue one another's run.

    Workers, strategy, what is measured, saved, exported or served may change between a run and its continuation.
    """
    train = {key: value for key, value in recipe["train"].items() if key not in INDIFFERENT}
    shaping = [step for step in recipe["compression"] if _changes_training(step["type"])]
    identity = {"model": recipe["model"], "data": recipe["data"], "optim": recipe["optim"], "train": train}
    return identity | ({"compression": shaping} if shaping else {})


def _changes_training(type_: str) -> bool:
    found = registry().components["compression"].get(type_)
    return bool(found and found.changes_training)  # type: ignore[attr-defined]


def resolve(recipe: Recipe, *, origins: Mapping[str, str] | None = None) -> Plan:
    """Turn a recipe into a plan; raise RecipeError or ResourceError with the number that makes it impossible."""
    _check_files(recipe)
    _check_tags(recipe)
    _check_exports(recipe)
    _check_schedule(recipe, recipe.train.steps)
    if (refusal := optimizer.refusal(recipe)) is not None:
        raise RecipeError(refusal)
    if (refusal := recipe.strategy.refusal(recipe)) is not None:
        raise RecipeError(f"strategy.type={recipe.strategy.type}: {refusal}")
    metric, mode = _metric(recipe)
    size = recipe.model.size()
    if size.context_length is not None and recipe.train.max_length > size.context_length:
        raise RecipeError(
            f"train.max_length={recipe.train.max_length} is more than the {size.context_length} positions the model has"
        )
    sizes = _sizes(recipe, size)
    return Plan(
        recipe=recipe,
        **_spread(recipe, size, sizes[-1]),
        sizes=sizes,
        resources_per_worker=_resources(recipe),
        metric=metric,
        metric_mode=mode,
        plugins=_plugins(recipe),
        size=size,
        origins=dict(origins or _origins(recipe)),
        steps=recipe.train.steps,
    )


# ---------------------------------------------------------------------------------------------- on how many workers


def _sizes(recipe: Recipe, size: ModelSize) -> tuple[int, ...]:
    """Return the numbers of workers in the recipe's range that the recipe can be carried out on."""
    least, most = recipe.scaling.min_workers, recipe.scaling.max_workers
    if least == most:
        _spread(recipe, size, most)
        return (most,)
    usable = tuple(count for count in range(least, most + 1) if _refused(recipe, size, count) is None)
    if not usable:
        raise RecipeError(_none_usable(recipe, size))
    return usable


def _none_usable(recipe: Recipe, size: ModelSize) -> str:
    """Say why no number of workers in the range will do, by the one that is nearest to one that would."""
    least, most = recipe.scaling.min_workers, recipe.scaling.max_workers
    fewer = next((n for n in range(least - 1, 0, -1) if _refused(recipe, size, n) is None), None)
    more = next((n for n in range(most + 1, 2 * most + 1) if _refused(recipe, size, n) is None), None)
    near = most if fewer is None or (more is not None and more - most <= least - fewer) else least
    instead = " or ".join(str(count) for count in (fewer, more) if count is not None)
    return (
        f"scaling.num_workers=[{least}, {most}]: it runs on none of these numbers of workers. On {near}: "
        f"{_refused(recipe, size, near)}" + (f". The nearest that would do: {instead}" if instead else "")
    )


def _refused(recipe: Recipe, size: ModelSize, num_workers: int) -> RaytxError | None:
    """Return what speaks against carrying a recipe out on so many workers, or None."""
    try:
        _spread(recipe, size, num_workers)
    except (RecipeError, ResourceError) as error:
        return error
    return None


def _spread(recipe: Recipe, size: ModelSize, num_workers: int) -> dict[str, Any]:
    """Return what a plan says of a number of workers; raise the number that makes it impossible."""
    layout = _layout(recipe, num_workers)
    accumulation = _accumulation(recipe, layout)
    if (misfit := recipe.strategy.misfit(recipe, layout, size)) is not None:
        raise RecipeError(f"strategy.type={recipe.strategy.type}: {misfit}")
    stages = recipe.strategy.stages(layout, size)
    memory = _memory(recipe, layout, size, stages, accumulation)
    held = save_bytes(size, world_size=num_workers, optim=recipe.optim) if recipe.save.background else 0
    _check_memory(recipe, max(stage.total for stage in memory), held=held)
    return {"layout": layout, "gradient_accumulation_steps": accumulation, "stages": stages, "memory": memory}


def _layout(recipe: Recipe, num_workers: int) -> Layout:
    layout = recipe.strategy.layout(num_workers)
    if layout.world_size != num_workers:
        raise RecipeError(
            f"strategy.type={recipe.strategy.type} runs on {layout.world_size} workers, "
            f"scaling.num_workers is {num_workers}"
        )
    return layout


def _memory(
    recipe: Recipe, layout: Layout, size: ModelSize, stages: Sequence[tuple[int, int]], accumulation: int
) -> tuple[Memory, ...]:
    """Estimate a rank's bytes: one estimate, or one for each pipeline stage."""
    shares = recipe.strategy.shares(layout)
    options: Any = {
        "micro_batch_size": recipe.train.micro_batch_size,
        "max_length": recipe.train.max_length,
        "precision": recipe.train.precision,
        "activation_checkpointing": recipe.train.activation_checkpointing,
        "optim": recipe.optim,
    }
    if not stages:
        return (estimate(size, shares, **options),)
    return estimate_stages(size, shares, stages=stages, gradient_accumulation_steps=accumulation, **options)


def _accumulation(recipe: Recipe, layout: Layout) -> int:
    """global batch = micro batch x accumulation x data-parallel ranks; what does not divide is refused."""
    micro, wanted, ranks = recipe.train.micro_batch_size, recipe.train.global_batch_size, layout.data_parallel_size
    unit = micro * ranks
    steps, rest = divmod(wanted, unit)
    if rest or not steps:
        near = " or ".join(str(multiple * unit) for multiple in (steps, steps + 1) if multiple)
        smaller = [size for size in range(micro - 1, 0, -1) if wanted % (size * ranks) == 0]
        also = f", or train.micro_batch_size={smaller[0]}" if smaller else ""
        raise RecipeError(
            f"train.global_batch_size={wanted} is no multiple of train.micro_batch_size={micro} x {ranks} "
            f"data-parallel ranks = {unit}. Use {near}{also}"
        )
    return steps


def _metric(recipe: Recipe) -> tuple[str, Literal["min", "max"]]:
    modes = recipe.model.task_class().metrics_mode
    metric = recipe.evaluate.metric or next(iter(modes))
    if metric not in modes:
        raise RecipeError(
            f"evaluate.metric: {metric!r} is not computed by task {recipe.model.task_class().name!r}."
            f"{did_you_mean(metric, modes)} Allowed: {', '.join(modes)}"
        )
    return metric, recipe.evaluate.mode or modes[metric]


def _resources(recipe: Recipe) -> dict[str, float]:
    scaling = recipe.scaling
    resources = dict(scaling.resources_per_worker or {"GPU" if scaling.use_gpu else "CPU": 1.0})
    if scaling.use_gpu:
        resources.setdefault("GPU", 1.0)
    elif resources.get("GPU"):
        raise RecipeError("scaling.resources_per_worker asks for GPU, but scaling.use_gpu is false")
    return resources


def _check_memory(recipe: Recipe, needed: int, *, held: int) -> None:
    """Raise ResourceError where a rank's bytes, and those that it holds for a save, are more than it is to have."""
    limit = (recipe.scaling.resources_per_worker or {}).get("memory")
    host = held + (0 if recipe.scaling.use_gpu else needed)
    if limit and host > limit:
        saving = f", {held:,} of them while a save is written (none with save.background=false)" if held else ""
        raise ResourceError(
            f"one rank needs about {host:,} bytes of memory{saving}, scaling.resources_per_worker.memory is "
            f"{limit:,.0f}. Use more workers with a strategy that shards, a smaller train.micro_batch_size, or "
            "train.activation_checkpointing=true"
        )


def _check_files(recipe: Recipe) -> None:
    missing = [
        f"{component.kind}.{key}={path}"
        for component in recipe.components()
        for key, path in component.local_files()
        if not Path(path).expanduser().exists()
    ]
    if missing:
        raise RecipeError(f"no such file: {'; '.join(missing)} (looked from {Path.cwd()})")


def _check_tags(recipe: Recipe) -> None:
    """Refuse pairs of components that cannot work together."""
    provided = {tag: component for component in recipe.components() for tag in component.provides}
    for component in recipe.components():
        for tag in component.requires - provided.keys():
            raise RecipeError(
                f"{component.kind} {component.type!r} needs {tag!r}, which neither model {recipe.model.type!r} nor any "
                "other component of the recipe provides"
            )
        for tag, reason in component.conflicts.items():
            if tag in provided:
                other = provided[tag]
                raise RecipeError(
                    f"{component.kind} {component.type!r} does not go with {other.kind} {other.type!r}: {reason}"
                )


def _check_schedule(recipe: Recipe, steps: int | None) -> None:
    if steps is not None and (refusal := schedule.refusal(recipe.optim, steps=max(steps, 1))) is not None:
        raise RecipeError(refusal)


def _check_exports(recipe: Recipe) -> None:
    types = [config.type for config in recipe.export]
    if twice := sorted({type_ for type_ in types if types.count(type_) > 1}):
        raise RecipeError(f"export: {', '.join(twice)} is given twice; an artifact's directory is named by its type")


def _plugins(recipe: Recipe) -> dict[str, str]:
    owners = {registry().owner(component) for component in recipe.components()}
    needed = {name for component in recipe.components() for name in getattr(component, "plugins", ())}
    owners |= {registry().plugins[name] for name in needed}
    return {plugin.name: plugin.version for plugin in sorted(owners, key=lambda plugin: plugin.name)}


def check_plugins(wanted: Mapping[str, str]) -> None:
    """Raise PluginError unless this process has the plugins of a plan or artifact, at the same versions."""
    for name, version in wanted.items():
        plugin = registry().plugins.get(name)
        if plugin is None or plugin.error:
            why = plugin.error if plugin else "it is not installed"
            raise PluginError(f"plugin {name!r} {version} is needed, but {why}")
        if plugin.version != version:
            raise PluginError(
                f"plugin {name!r} is {plugin.version} here and {version} in the plan; install the same version"
            )


def _origins(recipe: Recipe) -> dict[str, str]:
    """Tell values that were set from those left at their default."""
    origins: dict[str, str] = {}

    def visit(section: Any, prefix: str) -> None:
        for name in type(section).model_fields:
            value, path = getattr(section, name), f"{prefix}{name}"
            if hasattr(value, "model_fields_set"):
                visit(value, f"{path}.")
            elif isinstance(value, tuple) and value and isinstance(value[0], Component):
                for place, component in enumerate(value):
                    visit(component, f"{path}.{place}.")
            else:
                origins[path] = "recipe" if name in section.model_fields_set else "default"

    visit(recipe, "")
    return origins


def origins(recipe: Recipe, overrides: Mapping[str, Any]) -> dict[str, str]:
    """Return where each value came from, naming the ones that were overridden."""
    found = _origins(recipe)
    overridden = [path for path in found if any(path == key or path.startswith(f"{key}.") for key in overrides)]
    return found | dict.fromkeys(overridden, "override")


def strategy_settings(plan: Plan) -> dict[str, tuple[Any, str]]:
    """Return the settings generated for the strategy's library, each with its origin."""
    strategy: StrategyConfig = plan.recipe.strategy
    return strategy.engine_config(plan)
