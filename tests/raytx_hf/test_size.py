"""What the plan needs to know of a model is counted without allocating it."""

from __future__ import annotations

from typing import Any

import pytest

from raytx.components import ModelSize
from raytx.registry import registry

EMBEDDING = 320 * 32


def size(component: dict[str, Any], **changes: Any) -> ModelSize:
    return registry().parse("model", {**component, **changes}).size()


def llama(tiny: Any, **changes: Any) -> dict[str, Any]:
    return {**tiny.causal["llama"], "config": {**tiny.llama, **changes}}


def test_pieces_are_embedding_layers_and_head(tiny: Any) -> None:
    found = size(llama(tiny))
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    assert found.pieces == (EMBEDDING, layer, layer, 32 + EMBEDDING)
    assert sum(found.pieces) == found.parameters
    assert found.not_pipelined == ""


def test_a_tied_head_counts_in_both_of_its_pieces(tiny: Any) -> None:
    found = size(llama(tiny, tie_word_embeddings=True))
    assert found.pieces[0] == EMBEDDING
    assert found.pieces[-1] == 32 + EMBEDDING
    assert sum(found.pieces) == found.parameters + EMBEDDING


def test_adapters_count_in_their_layers(tiny: Any) -> None:
    plain, found = size(llama(tiny)), size({**llama(tiny), "adapter": {"r": 4, "target_modules": ["q_proj"]}})
    assert found.trainable == 2 * 4 * (32 + 32)
    assert found.pieces[1] == plain.pieces[1] + 4 * (32 + 32)


@pytest.mark.parametrize("family", ["llama", "gpt2", "decoder"])
def test_decoders_can_be_cut_both_ways(tiny: Any, family: str) -> None:
    found = size(tiny.causal[family])
    assert len(found.pieces) == found.layers + 2
    assert found.tensor_parallel == {"llama": 2, "gpt2": 4, "decoder": 2}[family]
    assert found.not_tensor_parallel == ""


def test_an_encoder_has_no_pieces_but_ranks_can_share_its_layers(tiny: Any) -> None:
    found = size(tiny.classifier)
    assert found.pieces == ()
    assert "causal-lm" in found.not_pipelined
    assert (found.tensor_parallel, found.not_tensor_parallel) == (4, "")


def test_a_model_is_sliced_only_where_nothing_but_attention_mixes_places(tiny: Any) -> None:
    assert size(tiny.causal["llama"]).not_sliced == ""
    hybrid = {**tiny.llama, "model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]}
    sizes = {"num_experts": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "head_dim": 8}
    found = size({**tiny.causal["llama"], "config": {**hybrid, **sizes}})
    assert "linear_attention" in found.not_sliced
