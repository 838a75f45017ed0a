"""Steps whose loss or gradients are not finite: which samples they come from, and what is said of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from raytx import pulse
from raytx.batches import Batches
from raytx.components import Engine, Microbatch

TRIED = 64
"""Samples that are tried one by one at most: where more are under suspicion, it is the weights that are at fault."""
SHOWN = 64


def is_finite(metrics: Mapping[str, float]) -> bool:
    """Tell whether a step's numbers are; if not, its engine has updated nothing. The same on every rank."""
    return all(map(math.isfinite, metrics.values()))


def culprits(engine: Engine, batches: Batches, microbatches: Sequence[Microbatch]) -> list[int]:
    """Return the samples of a step whose loss is not finite by itself, or in its microbatch, or none. Collective.

    They are tried with the weights that the step met, which it has left as they were, but without dropout.
    """
    mine = [index for microbatch in microbatches if not _fine(engine, microbatch) for index in microbatch.samples]
    suspects = sorted({index for of_rank in engine.gather(mine) for index in of_rank})
    if len(suspects) > TRIED:
        return suspects
    return [index for index in suspects if not _fine(engine, batches.alone(index))] or suspects


def _fine(engine: Engine, microbatch: Microbatch) -> bool:
    pulse.phase("evaluation")  # together they may take many times as long as a step
    return math.isfinite(engine.eval_batch(microbatch, logits=False)[0])


def account(step: int, metrics: Mapping[str, float], samples: Sequence[int], found: Sequence[int]) -> str:
    """Return what people should know of such a step: its numbers and where they come from."""
    numbers = f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
    if found:
        return f"{numbers}. Samples with a loss that is not finite: {_listed(found)}"
    return f"{numbers}. Each sample's loss by itself is finite. Samples of the batch: {_listed(samples)}"


def _listed(samples: Sequence[int]) -> str:
    more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
    return ", ".join(map(str, samples[:SHOWN])) + more
