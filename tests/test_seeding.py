"""Every generator starts from the seed, each at another place."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import torch

from raytx.seeding import seed_generators


def drawn(*given, **part):
    seed_generators(*given, **part)
    return random.random(), float(np.random.random()), float(torch.rand((), dtype=torch.float64))


def test_what_is_drawn_follows_from_the_seed_alone():
    first = drawn(7)
    assert drawn(7) == first
    assert all(one != other for one, other in zip(drawn(8), first, strict=True))


def test_no_library_draws_what_another_does():
    """NumPy's and torch's generators are both Mersenne twisters, and the same one for the same small seed."""
    seed_generators(7)
    ours = set(np.random.randint(0, 2**32, 8, dtype=np.uint64)) | {random.getrandbits(32) for _ in range(8)}
    seed_generators(7)
    theirs = set(torch.randint(0, 2**32, (8,)).tolist())
    assert len(ours) == 16
    assert not ours & theirs


def test_parts_of_a_sample_differ_in_torch_and_agree_elsewhere():
    whole, slice_ = drawn(7), drawn(7, part=1)
    assert whole[:2] == slice_[:2]
    assert whole[2] != slice_[2]


def test_seeds_of_pieces_may_be_longer_than_numpys():
    assert drawn((2**32 - 1) << 16 | 3) != drawn((2**32 - 1) << 16 | 4)


def test_torch_is_not_loaded_for_it():
    code = "import sys, raytx.seeding as s; s.seed_generators(1); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
