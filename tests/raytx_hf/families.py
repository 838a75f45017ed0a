"""Tiny configs of the families that parallel strategies are proven for."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from raytx_torch import decoder_model

DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
HEADS = {**DECODER, "head_dim": 8}
EXPERTS = {**DECODER, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 96}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}

CAUSAL: dict[str, dict[str, Any]] = {
    "raytx_decoder": DECODER,
    "llama": DECODER,
    "mistral": {**DECODER, "sliding_window": 4},
    "qwen2": DECODER,
    "qwen3": HEADS,
    "gemma": HEADS,
    "gemma2": {**HEADS, "sliding_window": 4, "final_logit_softcapping": 0.5},
    "gemma3_text": {**HEADS, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    "phi3": DECODER,
    "gpt_neox": {key: value for key, value in DECODER.items() if key != "num_key_value_heads"},
    "gpt2": {**GPT2, **NO_DROPOUT},
    "olmo2": DECODER,
    "mixtral": {**DECODER, "num_local_experts": 4},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32},
}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "distilbert": {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
    },
    "t5": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    },
}


def model_of(family: str, *, device: str = "cpu", **changes: Any) -> Any:
    """Return a family's model with spread random weights, or its structure where the device is meta."""
    decoder_model.register()
    causal = family in CAUSAL
    shape = CAUSAL[family] if causal else _classifier(family)
    config = AutoConfig.for_model(family, **{**shape, **changes})
    auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    torch.manual_seed(0)
    with torch.device(device):
        model = auto.from_config(config, dtype=torch.float32)
    model.config.use_cache = False
    return model if device == "meta" else spread(model)


def spread(model: Any) -> Any:
    """Initial weights are so small, and initial biases so zero, that a mistake could pass for rounding."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _classifier(family: str) -> dict[str, Any]:
    shape = {key: value for key, value in DECODER.items() if key not in ("num_key_value_heads", "num_hidden_layers")}
    ends = {"num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "num_labels": 3}
    own = {"distilbert": ("dim",), "t5": ("d_model",)}
    return {**({"vocab_size": 96} if family in own else shape), **ends, **CLASSIFIERS[family]}
