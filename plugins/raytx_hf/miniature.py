"""A small copy of an architecture with random weights: few layers, heads and tokens, to prove how it computes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from raytx_hf.architecture import from_config

if TYPE_CHECKING:
    from raytx_hf.model import HFModel

LAYERS, VOCABULARY, WINDOW = 2, 32, 3
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
WIDTH, HEADS = 512, 4
"""A wider model loses heads: all but four, or all but the first group where they share keys and values."""


def miniature(model: HFModel, config: PreTrainedConfig) -> Any:
    """Return the copy in evaluation mode; the caller forks torch's generator, which this seeds."""
    # No kernel of the user's choice: it may need a GPU, and the mask is not its making.
    unchosen = model.model_copy(update={"attn_implementation": None})
    return _made(config, lambda small: from_config(unchosen, small))


def likeness(module: PreTrainedModel) -> Any:
    """Return such a copy of a module's own class and config, whatever device the module is on."""
    with torch.device("cpu"):
        return _made(
            module.config,
            lambda small: type(module)._from_config(small, dtype=torch.float32, attn_implementation=None),
        )


def _made(config: PreTrainedConfig, make: Callable[[PreTrainedConfig], PreTrainedModel]) -> Any:
    torch.manual_seed(0)
    small = _shrunk(config)
    if small.get_text_config().hidden_size > WIDTH:
        with contextlib.suppress(Exception):  # an architecture whose widths go together in a way of its own keeps them
            return _tried(_spread(make(_narrowed(small)).eval()))
    return _spread(make(small).eval())


def _shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the same architecture with few layers and tokens: what matters is what a token sees, and how."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = min(LAYERS, text.num_hidden_layers)
    if types := vars(text).get("layer_types"):
        # One of each kind first: Gemma 3 has five sliding layers before a full one.
        text.layer_types = [*dict.fromkeys(types), *types][: text.num_hidden_layers]
    if getattr(text, "sliding_window", None):
        text.sliding_window = WINDOW
    text.vocab_size = VOCABULARY
    text.pad_token_id = None
    _thin_experts(text)
    return config


def _thin_experts(text: PreTrainedConfig) -> None:
    """Keep a few experts, and narrow ones: a hundred of them take gigabytes and prove nothing more."""
    for name in EXPERTS:
        if getattr(text, name, None):
            setattr(text, name, min(getattr(text, name), max(HEADS, getattr(text, "num_experts_per_tok", None) or 1)))
    if getattr(text, "moe_intermediate_size", None):
        text.moe_intermediate_size = min(text.moe_intermediate_size, WIDTH)


def _narrowed(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config with fewer heads of the same width, so that a proof about a large model takes no gigabytes."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    heads, groups = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    width = text.hidden_size // heads
    shared = bool(groups) and groups < heads
    text.num_attention_heads = heads // groups if shared else min(heads, HEADS)
    if groups:
        text.num_key_value_heads = 1 if shared else text.num_attention_heads
    text.hidden_size = width * text.num_attention_heads
    if getattr(text, "intermediate_size", None):
        text.intermediate_size = min(text.intermediate_size, text.hidden_size)
    return config


def _tried(module: PreTrainedModel) -> Any:
    """Return a module that can run; raise whatever its forward pass raises."""
    with torch.no_grad():
        module(input_ids=torch.tensor([[3, 4, 5]]))
    return module


def _spread(module: Any) -> Any:
    """Initial weights are so small that a leak could pass for rounding."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return module
