"""L1 pruning: exact sparsity, and nothing else changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from raytx.errors import RecipeError
from raytx_torch.pruning import L1Pruning

LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA, **options)).eval()


def pruned_weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [weight for name, weight in module.named_parameters() if name.endswith("_proj.weight")]


def zeros(weights: list[torch.Tensor]) -> int:
    return sum(int((weight == 0).sum()) for weight in weights)


def test_global_scope_zeroes_exactly_the_share_of_all_weights_together() -> None:
    module = L1Pruning(amount=0.4).build().convert(llama())
    weights = pruned_weights(module)
    assert zeros(weights) == round(0.4 * sum(weight.numel() for weight in weights))


def test_layer_scope_zeroes_exactly_the_share_of_each_layer() -> None:
    module = L1Pruning(amount=0.25, scope="layer").build().convert(llama())
    for weight in pruned_weights(module):
        assert zeros([weight]) == round(0.25 * weight.numel())


def test_the_smallest_weights_go_and_the_others_keep_their_value() -> None:
    before, module = llama(), L1Pruning(amount=0.5).build().convert(llama())
    old = torch.cat([weight.flatten() for weight in pruned_weights(before)])
    new = torch.cat([weight.flatten() for weight in pruned_weights(module)])
    assert old[new == 0].abs().max() <= old[new != 0].abs().min()
    assert torch.equal(old[new != 0], new[new != 0])


def test_the_state_dict_keeps_its_keys_so_the_pruned_model_loads_like_any_other() -> None:
    module = L1Pruning().build().convert(llama())
    assert module.state_dict().keys() == llama().state_dict().keys()
    restored = L1Pruning().build().restore(llama())
    restored.load_state_dict(module.state_dict())
    ids = torch.arange(8)[None]
    assert torch.equal(restored(ids).logits, module(ids).logits)


def test_embeddings_and_the_output_head_are_left_alone() -> None:
    before, module = llama(tie_word_embeddings=False), L1Pruning().build().convert(llama(tie_word_embeddings=False))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(module.get_parameter(name), before.get_parameter(name))


def test_a_tied_head_stays_tied_and_whole_even_when_nothing_is_excluded() -> None:
    module = L1Pruning(exclude=()).build().convert(llama(tie_word_embeddings=True))
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert zeros([module.lm_head.weight]) == 0
    assert zeros(pruned_weights(module)) > 0


def test_the_conv1d_layers_of_gpt2_are_linear_layers_too() -> None:
    module = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=4))
    L1Pruning(amount=0.5, scope="layer").build().convert(module)
    weight = module.transformer.h[0].attn.c_attn.weight
    assert zeros([weight]) == weight.numel() // 2


def test_a_pattern_excludes_everything_inside_the_module_it_names() -> None:
    module = L1Pruning(exclude=("model.layers.0", "lm_head")).build().convert(llama())
    assert zeros(pruned_weights(module.model.layers[0])) == 0
    assert zeros(pruned_weights(module.model.layers[1])) > 0


def test_a_model_with_nothing_left_to_prune_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"no linear layer to compress outside of exclude: \*"):
        L1Pruning(exclude=("*",)).build().convert(llama())
