"""Which samples each step trains on: a function of seed and step, never of the number of workers."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from raytx.components import Microbatch
from raytx.plan import Plan
from raytx.prepare import Samples
from raytx.seeding import seed_generators
from raytx.tasks.base import Features, Task


class Batches:
    """The microbatches of one data-parallel rank.

    The samples of an epoch are shuffled by (seed, epoch); step n takes the n-th window of global_batch_size of them.
    The window is cut into microbatches, of which each rank takes a contiguous share. So the set a step trains on, and
    what each microbatch holds, are the same on any number of ranks, and the position to resume from is the step alone.
    """

    def __init__(self, plan: Plan, task: Task, samples: Samples, *, dp_rank: int) -> None:
        self._plan, self._task, self.samples = plan, task, samples
        self._micro = plan.recipe.train.micro_batch_size
        self._first = dp_rank * plan.gradient_accumulation_steps

    def indices(self, step: int) -> np.ndarray:
        """Return the samples of a step's global batch; the last one of an epoch may be short."""
        assert self._plan.steps_per_epoch is not None
        epoch, place = divmod(step, self._plan.steps_per_epoch)
        size = self._plan.recipe.train.global_batch_size
        return self._order(epoch)[place * size : (place + 1) * size]

    def microbatches(self, step: int) -> list[Microbatch]:
        """Return this rank's share of a step: always gradient_accumulation_steps microbatches."""
        window = self.indices(step)
        targets = max(1, int(self.samples.num_targets[window].sum()))
        return [
            self._microbatch(window, slot, targets, step)
            for slot in range(self._first, self._first + self._plan.gradient_accumulation_steps)
        ]

    def tokens(self, step: int) -> int:
        """Return the tokens of a step's global batch."""
        return int(self.samples.lengths[self.indices(step)].sum())

    def alone(self, index: int) -> Microbatch:
        """Return a microbatch of a single sample."""
        features = self._collated(np.array([index]), self._seeds(index)[1])
        return Microbatch(features, weight=1.0, seed=0, samples=(index,))

    def _microbatch(self, window: np.ndarray, slot: int, targets: int, step: int) -> Microbatch:
        chosen = window[slot * self._micro : (slot + 1) * self._micro]
        weight = float(self.samples.num_targets[chosen].sum()) / targets
        # A short batch leaves slots empty. Every rank must still do the same passes: a weightless sample fills them.
        filled = chosen if len(chosen) else window[:1]
        seed, collating = self._seeds(step, slot)
        return Microbatch(self._collated(filled, collating), weight, seed, samples=tuple(chosen.tolist()))

    def _collated(self, chosen: np.ndarray, seed: int) -> Features:
        """Collate samples; what a task draws at random there is the same wherever and whenever it is done."""
        seed_generators(seed)
        return self._task.collate(self.samples[chosen])

    def _seeds(self, *place: int) -> tuple[int, int]:
        """Return the seeds of a forward pass and of collating: if they were one, both would draw the same numbers."""
        forward, collating = np.random.SeedSequence([self._plan.recipe.train.seed, *place]).generate_state(2)
        return int(forward), int(collating)

    @functools.lru_cache(maxsize=2)  # noqa: B019  one Batches lives as long as its process
    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._plan.recipe.train.seed, epoch]).permutation(len(self.samples))


def evaluation_batches(
    task: Task, samples: Samples, *, micro_batch_size: int, dp_rank: int, dp_size: int, limit: int | None
) -> Iterator[tuple[Microbatch, int]]:
    """Yield (microbatch, number of targets) of the held-out split for one rank.

    Every rank yields equally often, because a forward pass may be a collective; padding comes with 0 targets.
    """
    chosen = spread(len(samples), limit or len(samples))
    windows = [chosen[start : start + micro_batch_size] for start in range(0, len(chosen), micro_batch_size)]
    for first in range(0, len(windows), dp_size):
        mine = first + dp_rank
        window = windows[mine] if mine < len(windows) else windows[-1][:1]
        targets = int(samples.num_targets[window].sum()) if mine < len(windows) else 0
        seed_generators(mine)
        yield Microbatch(task.collate(samples[window]), weight=1.0, seed=mine), targets


def spread(count: int, limit: int) -> np.ndarray:
    """Return the indices of a subset that stands for the whole: drawn at random, but always the same, in order."""
    if limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:limit])
