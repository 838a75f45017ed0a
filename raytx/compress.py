"""Compress a trained module step by step, each measured against its limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from raytx.artifact import Golden
from raytx.batches import evaluation_batches
from raytx.components import CompressionConfig, Compressor, Model
from raytx.errors import ArtifactError
from raytx.plan import Plan
from raytx.prepare import Samples
from raytx.tasks.base import Runner, Task

MEASURED_SAMPLES = 64
"""Held-out samples on which the metric is measured before and after each step."""


@dataclass(frozen=True)
class Measurement:
    """What one step cost."""

    type: str
    relative_error: float
    """||after - before|| / ||before|| of the golden logits."""
    agreement: float
    """Share of golden positions whose largest logit stayed the largest."""
    metric: str
    before: float | None
    after: float | None
    """The metric on held-out samples; None when there are none."""


@dataclass(frozen=True)
class Compressed:
    """A compressed module, how to rebuild its structure, and what it must answer from now on."""

    module: Any
    compressors: list[Compressor]
    golden: Golden
    measurements: list[Measurement]


def compress(
    module: Any, model: Model, task: Task, *, golden: Golden, plan: Plan, held_out: Samples | None
) -> Compressed:
    """Apply the plan's compression in order; raise ArtifactError naming the step that goes over its limit."""
    compressors, measurements = [], []
    for step in plan.recipe.compression:
        before = _metric(model.runner(module), task, plan, held_out)
        compressor = step.build()
        module = compressor.convert(module)
        runner = model.runner(module)
        measured = _measure(step, runner, golden, plan, before, _metric(runner, task, plan, held_out))
        _judge(step, measured, plan)
        golden = replace(golden, logits=runner.logits(golden.features))
        compressors.append(compressor)
        measurements.append(measured)
    return Compressed(module, compressors, golden, measurements)


def _measure(
    step: CompressionConfig, runner: Runner, golden: Golden, plan: Plan, before: float | None, after: float | None
) -> Measurement:
    same = golden.real(runner.logits(golden.features)).argmax(-1) == golden.real(golden.logits).argmax(-1)
    return Measurement(
        type=step.type,
        relative_error=golden.relative_error(runner),
        agreement=float(np.mean(same)),
        metric=plan.metric,
        before=before,
        after=after,
    )


def _judge(step: CompressionConfig, measured: Measurement, plan: Plan) -> None:
    limit = step.max_relative_error
    if limit is not None and not measured.relative_error <= limit:
        raise ArtifactError(
            f"compression {step.type!r}: relative error {measured.relative_error:.3g}, max_relative_error is "
            f"{limit:g}. Compress less, or raise the limit"
        )
    if step.max_metric_loss is None or measured.before is None or measured.after is None:
        return
    loss = (measured.after - measured.before) * (1 if plan.metric_mode == "min" else -1)
    if not loss <= step.max_metric_loss:
        raise ArtifactError(
            f"compression {step.type!r}: {plan.metric} went from {measured.before:.4f} to {measured.after:.4f}, "
            f"max_metric_loss is {step.max_metric_loss:g}. Compress less, or raise the limit"
        )


def _metric(runner: Runner, task: Task, plan: Plan, held_out: Samples | None) -> float | None:
    """Return the plan's metric on some held-out samples, computed from logits alone."""
    if held_out is None or not len(held_out):
        return None
    size = plan.recipe.train.micro_batch_size
    parts = []
    for microbatch, targets in evaluation_batches(
        task, held_out, micro_batch_size=size, dp_rank=0, dp_size=1, limit=MEASURED_SAMPLES
    ):
        logits = runner.logits(microbatch.features)
        parts.append(task.evaluation(microbatch.features, task.loss(microbatch.features, logits), logits, targets))
    return task.metrics(parts)[plan.metric]


def as_rows(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    return [asdict(measurement) for measurement in measurements]
