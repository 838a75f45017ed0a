"""Export a checkpoint: consolidate, compress, save in public formats, replay against golden outputs."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from raytx import checkpoint, mirror
from raytx.artifact import GOLDEN, Artifact, Golden, open_artifact, publish, read, replay
from raytx.checkpoint import Checkpoint
from raytx.components import Exportable, ExportConfig, Model
from raytx.compress import Compressed, as_rows, compress
from raytx.errors import ArtifactError, CheckpointError, RecipeError
from raytx.files import digest, write_json
from raytx.plan import Plan
from raytx.prepare import Samples, bring
from raytx.run import EXPORTING, at_work
from raytx.storage import is_uri
from raytx.tasks.base import Task

CONSOLIDATED_LIMIT = {"fp32": 1e-5, "bf16": 3e-2}
"""Largest relative error between the trained engine's logits and those of the fp32 module made of its checkpoint.

Under bf16 the engine's own logits are rounded (8 bits of mantissa, through every layer), so the limit is that of bf16.
"""


@dataclass(frozen=True)
class Exported:
    """What an export left: artifact directories by type, and lines that tell a user about them."""

    artifacts: dict[str, Path]
    remarks: list[str]
    samples: list[tuple[str, str]]
    """What the first artifact answers to a few held-out requests: (request, response) as shown to a user."""

    def show(self, console: Console) -> None:
        for remark in self.remarks:
            console.print(remark, highlight=False, markup=False, soft_wrap=True)
        console.print("\n[bold]what it answers to held-out samples[/]")
        for request, response in self.samples:
            console.print(f"{_indented(request)}", style="dim", highlight=False, markup=False)
            console.print(f"{_indented(response, '  > ')}\n", highlight=False, markup=False)


def _indented(text: str, prefix: str = "    ") -> str:
    return textwrap.indent(text, prefix, lambda line: True)


def export(path: str | Path, plan: Plan | None = None) -> Exported:
    """Export a checkpoint, or the chosen checkpoint of a run directory.

    Compression and exports are the plan's, or those of the recipe it was trained with when none is given. Raises
    ArtifactError, publishing nothing of that form, when it disagrees with the golden outputs of training.
    """
    source = checkpoint.load(path)
    if source.directory.parent.name != "checkpoints":
        raise CheckpointError(
            f"{path}: not inside a run's checkpoints/; artifacts are written beside it, so copy whole runs"
        )
    plan = plan or _recorded(source)
    if not plan.recipe.export:
        raise RecipeError(f"{path}: its recipe exports nothing; add export: [{{type: hf}}] and train again")
    model = plan.recipe.model.build()
    task = model.task(source.processor)
    module, golden = consolidate(source, model, plan)
    compressed = compress(model.merged(module), model, task, golden=golden, plan=plan, held_out=_held_out(plan))
    if compressed.measurements:
        write_json(_run_dir(source) / "compression.json", as_rows(compressed.measurements))
    remarks = [_compression_line(row) for row in as_rows(compressed.measurements)]
    for config in plan.recipe.export:
        directory = _place(config, source)
        difference = _export_one(config, directory, source, plan, model, task, compressed)
        remarks.append(f"{config.type}: {directory}, golden outputs reproduced to {difference:.1e}")
    artifacts = {config.type: _place(config, source) for config in plan.recipe.export}
    return Exported(artifacts, remarks, _demo(next(iter(artifacts.values())), source))


def export_again(place: str, *, tell: Callable[[str], None]) -> Exported:
    """Export a checkpoint, or the chosen one of a run that a directory or a URI names, and hold the run meanwhile."""
    if not is_uri(place):
        source = checkpoint.load(place).directory
        with at_work(source.parent.parent, EXPORTING):
            return export(source)
    plan = mirror.recorded(place)
    with at_work(plan.run_dir, EXPORTING), mirror.held(plan, doing=EXPORTING, tell=tell) as mirrored:
        assert mirrored is not None
        bring(plan)
        mirrored.pull_artifacts()
        exported = export(mirrored.chosen(plan).directory)
        mirrored.push_artifacts()
        return exported


def _recorded(source: Checkpoint) -> Plan:
    """Return the plan a checkpoint was saved under; whoever wrote it may not decide that code runs here."""
    plan = Plan.from_dict(source.plan)
    return replace(plan, recipe=plan.recipe.model_copy(update={"model": plan.recipe.model.distrusted()}))


def published(path: str | Path, plan: Plan) -> dict[str, Path] | None:
    """Return the artifacts of a checkpoint if all that the plan asks for are there and whole, else None."""
    source = checkpoint.load(path)
    artifacts = {config.type: _place(config, source) for config in plan.recipe.export}
    for config in plan.recipe.export:
        try:
            if read(artifacts[config.type]).lineage["made_of"] != _made_of(config, source, plan):
                return None
        except ArtifactError:
            return None
    return artifacts


def _run_dir(source: Checkpoint) -> Path:
    return source.directory.parent.parent


def _place(config: ExportConfig, source: Checkpoint) -> Path:
    return _run_dir(source) / "artifacts" / config.type


def consolidate(source: Checkpoint, model: Model, plan: Plan) -> tuple[Any, Golden]:
    """Build one whole module of a checkpoint's weights and hold it to what the trained engine answered.

    Returns the module and the golden outputs for what follows: the engine's own in fp32, the module's under bf16.
    """
    module = model.module(source.processor, seed=plan.recipe.train.seed)
    model.assign(module, source.weights())
    golden, runner = source.golden, model.runner(module)
    error, limit = golden.relative_error(runner), CONSOLIDATED_LIMIT[plan.recipe.train.precision]
    if not error <= limit:
        raise ArtifactError(
            f"{source.directory}: the consolidated weights answer otherwise than the trained model did (relative error "
            f"{error:.1e}, {limit:.0e} is allowed); nothing is exported"
        )
    if plan.recipe.train.precision != "fp32":
        golden = replace(golden, logits=runner.logits(golden.features))
    return module, golden


def _export_one(
    config: ExportConfig,
    directory: Path,
    source: Checkpoint,
    plan: Plan,
    model: Model,
    task: Task,
    compressed: Compressed,
) -> float:
    """Save one form beside its place, replay it from there, and only then put it in place."""
    staging = directory.with_name(f".{directory.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        exportable = Exportable(
            model=model,
            module=compressed.module,
            task=task,
            samples=compressed.golden.features,
            card=card(plan, source, compressed),
            compressors=compressed.compressors,
        )
        exporter = config.build()
        exporter.save(exportable, staging)
        runner = exporter.load(staging, model, compressed.compressors)
        difference = replay(compressed.golden, runner, config, directory)
        compressed.golden.save(staging / GOLDEN)
        publish(staging, directory, _manifest(config, source, plan, task, compressed, difference))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return difference


def _manifest(
    config: ExportConfig, source: Checkpoint, plan: Plan, task: Task, compressed: Compressed, difference: float
) -> Artifact:
    recipe = plan.recipe
    return Artifact(
        name=recipe.name,
        task=task.name,
        model=recipe.model.model_dump(mode="json"),
        exporter=config.model_dump(mode="json"),
        compression=[step.model_dump(mode="json") for step in recipe.compression],
        plugins=plan.plugins,
        metrics=source.state.metrics,
        golden_difference=difference,
        lineage=_lineage(config, source, plan),
        files={},
        serving=recipe.serving.model_dump(mode="json", exclude_defaults=True),
        labels=task.label_names(),
        measured={"compression": as_rows(compressed.measurements)},
    )


def _lineage(config: ExportConfig, source: Checkpoint, plan: Plan) -> dict[str, Any]:
    return {
        "run": plan.recipe.name,
        "step": source.step,
        "checkpoint": source.directory.name,
        "plan": plan.fingerprint(),
        "made_of": _made_of(config, source, plan),
        "recipe": plan.recipe.dump(),
    }


def _made_of(config: ExportConfig, source: Checkpoint, plan: Plan) -> str:
    return made_of(
        source.manifest,
        plugins=plan.plugins,
        exporter=config.model_dump(mode="json"),
        compression=[step.model_dump(mode="json") for step in plan.recipe.compression],
        serving=plan.recipe.serving.model_dump(mode="json"),
    )


def made_of(manifest: Any, *, plugins: Any, exporter: Any, compression: Any, serving: Any) -> str:
    """Return a name for all that an artifact follows from; the same name means the same artifact."""
    return digest([manifest, plugins, exporter, compression, serving])


def _held_out(plan: Plan) -> Samples | None:
    path = plan.data_dir / "test.arrow" if plan.prepared else Path()
    return Samples.open(path) if path.is_file() else None


def _demo(directory: Path, source: Checkpoint) -> list[tuple[str, str]]:
    """Open the first artifact as a server would and let it answer a few held-out requests."""
    predictor = open_artifact(directory)
    requests = [request for request, _ in source.demo]
    answers = [predictor.task.show(predictor.predict([request])[0]) for request in requests]
    return [(shown, answer) for (_, shown), answer in zip(source.demo, answers, strict=True)]


def _compression_line(row: dict[str, Any]) -> str:
    change = "" if row["before"] is None else f", {row['metric']} {row['before']:.4f} -> {row['after']:.4f}"
    return f"{row['type']}: relative error {row['relative_error']:.2e}, agreement {row['agreement']:.1%}{change}"


def card(plan: Plan, source: Checkpoint, compressed: Compressed) -> str:
    """Return the model card: YAML front matter for hubs, then what a reader needs to trust the model."""
    recipe, task = plan.recipe, plan.recipe.model.task_class()
    pipeline = {"causal-lm": "text-generation", "sequence-classification": "text-classification"}
    front = {
        "library_name": "transformers",
        "pipeline_tag": pipeline.get(task.name, task.name),
        "tags": ["raytx", recipe.model.type],
        "metrics": sorted(source.state.metrics),
    }
    metrics = "\n".join(f"| {name} | {value:.4f} |" for name, value in source.state.metrics.items()) or "| none | - |"
    steps = "\n".join(f"- {_compression_line(row)}" for row in as_rows(compressed.measurements)) or "- none"
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {recipe.name}

Task {task.name}; {plan.size.parameters:,} parameters, {plan.size.trainable:,} of them trained; step {source.step} of
{plan.steps}.

## Evaluation (held-out split)

| metric | value |
|---|---|
{metrics}

## Compression

{steps}

## Reproduce

Save the recipe below as `recipe.yaml` and run `raytx train recipe.yaml` (raytx {plan.version}). The numbers do not
depend on the workers used: {plan.world_size} x {recipe.strategy.type} here.

```yaml
{yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True).strip()}
```

## Serve

`raytx serve <this directory>` replays the golden outputs recorded in training before it answers the first request.
"""
