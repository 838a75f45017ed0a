"""Choose next tokens from logits: greedy or sampled, the same for every exported form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from raytx.tasks.base import Request, Runner

Sampler = Callable[[np.ndarray], int]
"""Takes one sequence's logits (vocabulary,), returns a token."""


def sampler(request: Request) -> Sampler:
    """Return the sampler that a request asks for: temperature 0 is greedy; top_k, then top_p cut the tail."""
    temperature = float(request.get("temperature", 0.0))
    if temperature == 0.0:
        return lambda logits: int(logits.argmax())
    top_k, top_p = int(request.get("top_k") or 0), float(request.get("top_p", 1.0))
    generator = np.random.default_rng(request.get("seed"))

    def sample(logits: np.ndarray) -> int:
        order = np.argsort(-logits, kind="stable")[: top_k or None]
        scaled = logits[order].astype(np.float64) / temperature
        share = np.exp(scaled - scaled.max())
        share /= share.sum()
        # Nucleus sampling (Holtzman et al. 2020): the smallest head whose mass reaches top_p, never empty.
        head = int(np.searchsorted(np.cumsum(share), top_p)) + 1
        share = share[:head] / share[:head].sum()
        return int(order[generator.choice(len(share), p=share)])

    return sample


def decode(
    runner: Runner, prompts: Sequence[Sequence[int]], samplers: Sequence[Sampler], limits: Sequence[int]
) -> Iterator[list[int | None]]:
    """Yield one token per prompt and step; None once a prompt's limit is reached. Ends when all limits are.

    The caller stops earlier by closing the iterator.
    """
    cache, logits = runner.prefill(prompts)
    for step in range(max(limits)):
        tokens = [choose(row) for choose, row in zip(samplers, logits, strict=True)]
        yield [token if step < limit else None for token, limit in zip(tokens, limits, strict=True)]
        if step + 1 < max(limits):
            cache, logits = runner.step(cache, np.asarray(tokens, dtype=np.int64))
    yield [None] * len(prompts)
