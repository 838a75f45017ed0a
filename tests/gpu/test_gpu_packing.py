"""Packed documents see nothing of each other, whichever kernel computes attention."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import parity_matrix as matrix
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

LIMITS = {"sdpa": 1e-5, "flex_attention": 1e-5, "flash_attention_2": 2e-3}
"""Relative difference of a document's mean loss, packed against alone: in fp32, and in bf16 for flash attention."""
LENGTHS = (5, 130, 64, 1, 211, 37)
"""Tokens of the documents in a row of 512: across the blocks of 128 that flex attention skips by."""
FAMILIES = [family for family in matrix.FAMILIES if family.name in ("decoder", "llama", "mistral", "qwen3")]


def documents(accelerator: Any) -> list[np.ndarray]:
    """Draw token ids; a document of one token has nothing to predict, and must not disturb its neighbours."""
    rng, size = np.random.default_rng(5), accelerator.size
    return [rng.integers(5, size.vocabulary - 5, max(1, length * size.length // 512)) for length in LENGTHS]


def losses_alone(forward: Callable[..., Any], found: list[np.ndarray]) -> list[float]:
    return [_loss(forward(ids, np.arange(len(ids))), ids) for ids in found if len(ids) > 1]


def losses_packed(forward: Callable[..., Any], found: list[np.ndarray], *, restarting: bool = True) -> list[float]:
    """All documents in one row; positions that begin again tell where one ends."""
    ids = np.concatenate(found)
    positions = np.concatenate([np.arange(len(of)) for of in found]) if restarting else np.arange(len(ids))
    logits, ends = forward(ids, positions), np.cumsum([len(of) for of in found])
    return [_loss(logits[end - len(of) : end], of) for of, end in zip(found, ends, strict=True) if len(of) > 1]


def _loss(logits: Any, ids: np.ndarray) -> float:
    import torch

    targets = torch.from_numpy(ids[1:]).to(logits.device)
    return float(torch.nn.functional.cross_entropy(logits[:-1].double(), targets))


@pytest.fixture
def forward(accelerator: Any, recipe: Callable[..., Any], prepared: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward pass of a family with a kernel: (length,) ids and positions to (length, vocabulary) logits."""
    import torch

    def make(family: matrix.Family, kernel: str) -> Callable[[np.ndarray, np.ndarray], Any]:
        plan = prepared(recipe(f"packing-{family.name}", family))
        directory = Path(plan.prepared) / "processor"
        module = plan.recipe.model.build().module(directory, seed=3)
        module.set_attn_implementation(kernel)
        dtype = torch.bfloat16 if kernel.startswith("flash") else torch.float32
        module = module.to(accelerator.device, dtype).eval()

        @torch.no_grad()
        def run(ids: np.ndarray, positions: np.ndarray) -> Any:
            batch = {"input_ids": ids, "position_ids": positions}
            moved = {key: torch.from_numpy(value)[None].to(accelerator.device) for key, value in batch.items()}
            return module(**moved, use_cache=False).logits[0]

        return run

    return make


@pytest.mark.parametrize("kernel", LIMITS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_document_loses_the_same_packed_and_alone(
    accelerator: Any, forward: Callable[..., Any], family: matrix.Family, kernel: str
) -> None:
    if kernel.startswith("flash") and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    run, found, limit = forward(family, kernel), documents(accelerator), LIMITS[kernel]
    alone = losses_alone(run, found)
    np.testing.assert_allclose(losses_packed(run, found), alone, rtol=limit)
    if limit <= 1e-5:
        leaking = losses_packed(run, found, restarting=False)
        assert not np.allclose(leaking, alone, rtol=10 * limit), "a leak must show, for the test to mean much"
