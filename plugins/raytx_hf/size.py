"""Count a model's parameters on the meta device: nothing is allocated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from raytx.components import ModelSize
from raytx.errors import RecipeError
from raytx_hf.adapter import adapted
from raytx_hf.architecture import base_config, check_attention, from_config
from raytx_hf.pieces import pieces_of, why_not
from raytx_hf.proof import flaw
from raytx_hf.tensor_plan import limit

if TYPE_CHECKING:
    from raytx_hf.model import HFModel

ATTENTION = {"full_attention", "sliding_attention"}


def measure(model: HFModel) -> ModelSize:
    """Return the size. A tied head counts in the first piece and in the last, as both stages hold it."""
    config = base_config(model)
    check_attention(model)
    module = _structure(model, config)
    text = config.get_text_config()
    wanted = getattr(model.tokenizer, "vocab_size", None)
    if wanted is not None and wanted > text.vocab_size:
        raise RecipeError(f"model.tokenizer.vocab_size={wanted} is more than the model's vocab_size={text.vocab_size}")
    parameters = list(module.parameters())  # tied ones come once
    not_pipelined = why_not(module, model.task) or flaw(module)
    tensor_parallel, not_tensor_parallel = limit(module)
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size if model.task == "causal-lm" else config.num_labels,
        context_length=getattr(text, "max_position_embeddings", None),
        pieces=() if not_pipelined else _pieces(module),
        not_pipelined=not_pipelined,
        tensor_parallel=tensor_parallel,
        not_tensor_parallel=not_tensor_parallel,
        not_sliced=_not_sliced(text),
    )


def _not_sliced(text: Any) -> str:
    """Convolutions and recurrences see their neighbours without attention, and would take a slice for a document."""
    others = sorted(set(getattr(text, "layer_types", None) or ()) - ATTENTION)
    return f"its layers of type {', '.join(others)} mix places without attention" if others else ""


def _structure(model: HFModel, config: Any) -> Any:
    with torch.device("meta"):
        # Without the kernel asked for: it may be installed on the workers alone, and has no parameters.
        module = from_config(model.model_copy(update={"attn_implementation": None}), config)
        return module if model.adapter is None else adapted(module, model.adapter, task=model.task)


def _pieces(module: Any) -> tuple[int, ...]:
    return tuple(sum(p.numel() for p in piece.module.parameters()) for piece in pieces_of(module, ()))
