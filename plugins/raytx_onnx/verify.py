"""Hold a graph to its module: other batches and lengths than were traced, padding, and growth token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from raytx.tasks.base import Features, Runner

SHAPES = ((3, 6), (1, 3))
"""(batch, length) to compare at; neither was traced."""
STEPS = 2
"""Tokens to append after a prompt."""


def difference(module: Any, runner: Runner, samples: Features, *, generates: bool) -> float:
    """Return the largest absolute difference between a runner's logits and the module's, on real tokens' places."""
    found = [_logits_difference(module, runner, batch) for batch in _batches(samples)]
    if generates:
        found.append(_generation_difference(module, runner, samples["input_ids"]))
    return max(found)


def _batches(samples: Features) -> list[Features]:
    return [_batch(samples, shape) for shape in SHAPES]


def _batch(samples: Features, shape: tuple[int, int]) -> Features:
    """Real values in another shape; every row but the first padded on the right, each by one place more."""
    batch = {key: np.resize(value, shape) for key, value in samples.items() if key not in ("labels", "position_ids")}
    places = np.arange(shape[1])[None, :]
    batch["attention_mask"] = (places < shape[1] - np.arange(shape[0])[:, None]).astype(np.int64)
    return batch


def _logits_difference(module: Any, runner: Runner, batch: Features) -> float:
    wanted, got = module_logits(module, batch), runner.logits(batch)
    apart = np.abs(wanted - got)
    return float(apart[batch["attention_mask"] == 1].max() if apart.ndim == 3 else apart.max())


def _generation_difference(module: Any, runner: Runner, tokens: np.ndarray) -> float:
    """Grow prompts of different lengths in one batch; the module reads each alone and whole."""
    rows = [np.resize(tokens, length).tolist() for length in (5, 2, 3)]
    cache, logits = runner.prefill(rows)
    apart = [_last_difference(module, rows, logits)]
    for _ in range(STEPS):
        chosen = logits.argmax(-1)
        rows = [[*row, int(token)] for row, token in zip(rows, chosen, strict=True)]
        cache, logits = runner.step(cache, chosen)
        apart.append(_last_difference(module, rows, logits))
    return max(apart)


def _last_difference(module: Any, rows: list[list[int]], logits: np.ndarray) -> float:
    wanted = [module_logits(module, {"input_ids": np.array([row])})[0, -1] for row in rows]
    return float(np.abs(np.stack(wanted) - logits).max())


def relative_error(logits: np.ndarray, exact: np.ndarray, features: Features) -> float:
    """Return ||logits - exact|| / ||exact|| over the places that hold real tokens."""
    if exact.ndim == 3 and "attention_mask" in features:
        real = features["attention_mask"] == 1
        logits, exact = logits[real], exact[real]
    return float(np.linalg.norm(logits - exact) / np.linalg.norm(exact))


def module_logits(module: Any, features: Features) -> np.ndarray:
    with torch.no_grad():
        output = module(**{key: torch.as_tensor(value) for key, value in features.items()})
    array: np.ndarray = output.logits.float().numpy()
    return array
