"""A small copy of an architecture with random weights: few layers and tokens, for proofs about how it sees."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from raytx_hf.architecture import from_config

if TYPE_CHECKING:
    from raytx_hf.model import HFModel

LAYERS, VOCABULARY = 2, 32


def miniature(model: HFModel, config: PreTrainedConfig) -> Any:
    """Return the copy in evaluation mode; the caller forks torch's generator, which this seeds."""
    torch.manual_seed(0)
    # No kernel of the user's choice: it may need a GPU, and the mask is not its making.
    module = from_config(model.model_copy(update={"attn_implementation": None}), _shrunk(config)).eval()
    _spread(module)
    return module


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
