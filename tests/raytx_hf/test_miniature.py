"""A small copy computes as its architecture does, and takes no gigabytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raytx_hf.miniature import LAYERS, likeness

LARGE: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
    "gemma2": {"hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16, "num_key_value_heads": 8},
    "gpt2": {"n_embd": 1600, "n_head": 25},
    "gpt_neox": {"hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 64},
    "mixtral": {"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8},
}


def structure(family: str, **shape: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))


@pytest.mark.parametrize("family", LARGE)
def test_the_copy_of_a_large_model_is_small(family: str) -> None:
    with torch.random.fork_rng(devices=[]):
        small = likeness(structure(family, **LARGE[family], num_hidden_layers=48, vocab_size=128000))
    assert small.config.num_hidden_layers == LAYERS
    assert sum(parameter.numel() for parameter in small.parameters()) < 3e7
    assert small(input_ids=torch.tensor([[3, 4, 5, 6]])).logits.isfinite().all()


def test_the_copy_keeps_how_many_heads_share_a_key() -> None:
    with torch.random.fork_rng(devices=[]):
        small = likeness(structure("llama", **LARGE["llama"], num_hidden_layers=1)).config
    assert small.num_attention_heads // small.num_key_value_heads == 8
    assert small.hidden_size // small.num_attention_heads == 128


def test_the_copy_has_a_layer_of_each_kind() -> None:
    """Gemma 3 looks back a window in five layers and at everything in the sixth."""
    types = ["sliding_attention"] * 5 + ["full_attention"]
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    whole = structure("gemma3_text", **shape, head_dim=8, num_hidden_layers=6, layer_types=types, vocab_size=96)
    with torch.random.fork_rng(devices=[]):
        assert likeness(whole).config.layer_types == ["sliding_attention", "full_attention"]
