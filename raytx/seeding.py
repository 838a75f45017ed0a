"""Random numbers of user code: every generator is set before each microbatch, so that none has to be saved."""

from __future__ import annotations

import random
import sys

import numpy as np


def seed_generators(seed: int, *, part: int = 0) -> None:
    """Set Python's, NumPy's and, where torch is loaded, torch's generators, those of its devices included.

    What is drawn next is then a function of the seed alone, whatever was drawn before, by whichever process. Each
    library starts elsewhere, as NumPy's and torch's generators give the same words for one seed; and torch's on the CPU
    reads 32 bits of it, so all of a longer one must be mixed into those. `part` numbers the slice of its samples that a
    rank computes: torch's generators differ by it, for that is where masks of elements come from; the others do not,
    for what they decide must be decided alike by all who share a sample.
    """
    random.seed(seed)
    np.random.seed(_words(seed, 0))
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(int(_words(seed, 1 + part)[0]))


def _words(*entropy: int) -> np.ndarray:
    return np.random.SeedSequence(entropy).generate_state(4)
