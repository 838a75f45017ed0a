"""Random numbers of user code: every generator is set before each microbatch, so that none has to be saved."""

from __future__ import annotations

import random
import sys

import numpy as np


def seed_generators(seed: int, *, part: int = 0) -> None:
    """Set Python's, NumPy's and, where torch is loaded, torch's generators, those of its devices included.

    What is drawn next is then a function of the seed alone, whatever was drawn before, by whichever process. Each
    library starts elsewhere, as NumPy's and torch's generators give the same words for one seed. `part` numbers what
    of the same samples a rank computes (a slice, a piece): torch's generators differ by it, for that is where masks of
    elements come from; the others do not, for what they decide must be decided alike by all who share a sample.
    """
    random.seed(seed)
    np.random.seed(np.random.SeedSequence(seed).generate_state(4))
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed ^ part << 32)
