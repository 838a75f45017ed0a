"""Prove that an architecture keeps packed documents apart, before anything is trained on them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from raytx.errors import RecipeError
from raytx_hf.architecture import from_config

if TYPE_CHECKING:
    from raytx_hf.model import HFModel

LAYERS, VOCABULARY = 2, 32
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
            torch.manual_seed(0)
            # No kernel of the user's choice: it may need a GPU, and the mask is not its making.
            module = from_config(model.model_copy(update={"attn_implementation": None}), _shrunk(config)).eval()
            _spread(module)
            alone = module(input_ids=ids[:, len(FIRST) :], use_cache=False).logits
            packed = module(input_ids=ids, position_ids=positions, use_cache=False).logits[:, len(FIRST) :]
    except (TypeError, ValueError) as error:
        raise RecipeError(_refusal(config, f"it takes no positions: {error}")) from None
    difference = float((alone - packed).abs().max() / alone.abs().max())
    if not difference <= TOLERANCE:
        raise RecipeError(_refusal(config, f"a document's logits change by {difference:.0e} behind another one"))


def _shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the same architecture with few layers and tokens: what matters is how it makes its mask."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = min(LAYERS, text.num_hidden_layers)
    if vars(text).get("layer_types"):
        text.layer_types = text.layer_types[:LAYERS]
    text.vocab_size = VOCABULARY
    text.pad_token_id = None
    return config


def _spread(module: Any) -> None:
    """Initial weights are so small that a leak could pass for rounding."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.1)


def _refusal(config: PreTrainedConfig, why: str) -> str:
    return f"model.packing: {config.model_type!r} does not keep packed documents apart ({why}); set model.packing=false"
