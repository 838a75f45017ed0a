"""Tensor parallelism: parts of arrays fit together, and a model cut over ranks is the model."""

from __future__ import annotations

import numpy as np
import pytest

from raytx_deepspeed.tensor import Share

FAMILIES = ["llama", "tied", "qwen3", "gpt2", "lora"]


@pytest.mark.parametrize(("dim", "blocks"), [(0, 1), (1, 1), (0, 3), (1, 3), (None, 1)])
def test_the_parts_of_an_array_join_to_the_whole(dim, blocks):
    whole = np.arange(12 * 24).reshape(12, 24)
    parts = [Share(rank, 2, None, dim=dim, blocks=blocks).take(whole) for rank in range(2)]
    assert np.array_equal(Share(0, 2, None, dim=dim, blocks=blocks).join(parts), whole)
    assert all(part.size == whole.size / (2 if dim is not None else 1) for part in parts)


def test_each_block_of_a_fused_projection_is_cut_by_itself():
    whole = np.arange(12)
    assert Share(0, 2, None, dim=0, blocks=3).take(whole).tolist() == [0, 1, 4, 5, 8, 9]
    assert Share(1, 2, None, dim=0, blocks=3).take(whole).tolist() == [2, 3, 6, 7, 10, 11]


def test_what_cannot_be_cut_evenly_is_refused():
    with pytest.raises(ValueError, match="18 cannot be cut into 3 blocks over 4 ranks"):
        Share(0, 4, None, dim=0, blocks=3).length(18)


@pytest.fixture(scope="module")
def cut_models(run_jobs):
    return run_jobs(2, {family: {"do": "gradients", "family": family} for family in FAMILIES})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_has_the_loss_and_every_gradient_of_the_whole_one(cut_models, family):
    found = cut_models[family]
    assert found["cut"] >= 8
    assert found["loss"] <= 1e-6
    assert found["logits"] <= 1e-5
    assert found["gradients"] <= 5e-6
