"""Which consecutive pieces of a model each pipeline stage holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

Stages = tuple[tuple[int, int], ...]
"""For each stage the pieces it holds, as [first, last)."""
_Found = tuple[tuple[float, float], tuple[int, ...]]
"""Of the first so many pieces: the dearest stage's cost, the sum of squares, and where the stages begin."""


def balanced(costs: Sequence[float], stages: int) -> Stages:
    """Return the stages of which the dearest is cheapest, none of them empty (the linear partition problem).

    Of several such it prefers even ones. The same costs always give the same stages.
    """
    assert 1 <= stages <= len(costs)
    before = [0.0, *accumulate(costs)]
    best: dict[int, _Found] = {n: ((before[n], before[n] ** 2), (0,)) for n in range(1, len(costs) + 1)}
    for held in range(2, stages + 1):
        best = {n: min(_extended(best, before, n, held)) for n in range(held, len(costs) + 1)}
    return explicit(best[len(costs)][1], len(costs))


def _extended(best: dict[int, _Found], before: list[float], n: int, held: int) -> list[_Found]:
    """Return every way to end the first n pieces with one more stage."""
    found = []
    for start in range(held - 1, n):
        (dearest, squares), starts = best[start]
        cost = before[n] - before[start]
        found.append(((max(dearest, cost), squares + cost**2), (*starts, start)))
    return found


def explicit(starts: Sequence[int], pieces: int) -> Stages:
    """Return the stages that begin at the given pieces."""
    return tuple(pairwise((*starts, pieces)))
