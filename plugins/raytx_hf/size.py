"""Count a model's parameters on the meta device: nothing is allocated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from raytx.components import ModelSize
from raytx.errors import RecipeError
from raytx_hf.adapter import adapted
from raytx_hf.architecture import base_config, check_attention, from_config

if TYPE_CHECKING:
    from raytx_hf.model import HFModel


def measure(model: HFModel) -> ModelSize:
    config = base_config(model)
    check_attention(model)
    with torch.device("meta"):
        # Without the kernel asked for: it may be installed on the workers alone, and has no parameters.
        module = from_config(model.model_copy(update={"attn_implementation": None}), config)
        module = module if model.adapter is None else adapted(module, model.adapter, task=model.task)
    text = config.get_text_config()
    wanted = getattr(model.tokenizer, "vocab_size", None)
    if wanted is not None and wanted > text.vocab_size:
        raise RecipeError(f"model.tokenizer.vocab_size={wanted} is more than the model's vocab_size={text.vocab_size}")
    parameters = list(module.parameters())  # tied ones come once
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size if model.task == "causal-lm" else config.num_labels,
        context_length=getattr(text, "max_position_embeddings", None),
    )
