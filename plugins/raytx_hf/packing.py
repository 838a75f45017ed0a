"""Prove that an architecture keeps packed documents apart, before anything is trained on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig

from raytx.errors import RecipeError
from raytx_hf.miniature import miniature

if TYPE_CHECKING:
    from raytx_hf.model import HFModel

FIRST, SECOND = [3, 4, 5], [6, 7, 8, 9]
TOLERANCE = 1e-4


def check_packing(model: HFModel, config: PreTrainedConfig) -> None:
    """Compare a document's logits alone and after another one; raise RecipeError where they differ.

    Positions that restart are all that tells where a document begins. Some architectures make their attention mask
    without them, and would train on leaks without a word.
    """
    ids = torch.tensor([FIRST + SECOND])
    positions = torch.tensor([[*range(len(FIRST)), *range(len(SECOND))]])
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            module = miniature(model, config)
            alone = module(input_ids=ids[:, len(FIRST) :], use_cache=False).logits
            packed = module(input_ids=ids, position_ids=positions, use_cache=False).logits[:, len(FIRST) :]
    except (TypeError, ValueError) as error:
        raise RecipeError(_refusal(config, f"it takes no positions: {error}")) from None
    difference = float((alone - packed).abs().max() / alone.abs().max())
    if not difference <= TOLERANCE:
        raise RecipeError(_refusal(config, f"a document's logits change by {difference:.0e} behind another one"))


def _refusal(config: PreTrainedConfig, why: str) -> str:
    return f"model.packing: {config.model_type!r} does not keep packed documents apart ({why}); set model.packing=false"
