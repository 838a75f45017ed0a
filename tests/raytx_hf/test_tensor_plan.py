"""Every family's layers have the style in which tensor-parallel ranks share them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raytx.components import TensorStyle
from raytx.errors import RecipeError
from raytx_hf.adapter import adapted
from raytx_hf.model import LoRA
from raytx_hf.tensor_plan import limit, plan_of
from tests.raytx_hf.families import CAUSAL, CLASSIFIERS, model_of

EXPERTS = ("mixtral", "qwen2_moe")
COLUMN, ROW, WHOLE = TensorStyle("column"), TensorStyle("row"), None


def structure(family: str, **changes: Any) -> Any:
    return model_of(family, device="meta", **changes)


@pytest.mark.parametrize("family", [f for f in (*CAUSAL, *CLASSIFIERS) if f not in EXPERTS])
def test_every_name_in_a_plan_is_a_layer_with_a_weight(family: str) -> None:
    module = structure(family)
    plan = plan_of(module)
    assert all(isinstance(module.get_submodule(name).weight, torch.nn.Parameter) for name in plan.layers)
    for name, attributes in plan.divided.items():
        assert all(getattr(module.get_submodule(name), attribute) % 4 == 0 for attribute in attributes)


@pytest.mark.parametrize(
    ("family", "name", "style"),
    [
        ("llama", "model.layers.0.self_attn.q_proj", COLUMN),
        ("llama", "model.layers.2.mlp.down_proj", ROW),
        ("llama", "model.embed_tokens", WHOLE),
        ("llama", "lm_head", TensorStyle("column", gather=True)),
        ("raytx_decoder", "lm_head", WHOLE),
        ("qwen3", "model.layers.1.self_attn.k_norm", TensorStyle("shared")),
        ("olmo2", "model.layers.0.self_attn.k_proj", TensorStyle("column", gather=True)),
        ("olmo2", "model.layers.0.self_attn.o_proj", WHOLE),
        ("olmo2", "model.layers.0.self_attn.k_norm", WHOLE),
        ("phi3", "model.layers.0.mlp.gate_up_proj", TensorStyle("column", blocks=2)),
        ("phi3", "lm_head", TensorStyle("column", gather=True)),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value", COLUMN),
        ("gpt2", "transformer.h.0.attn.c_attn", TensorStyle("column", blocks=3, transposed=True)),
        ("gpt2", "transformer.h.0.mlp.c_proj", TensorStyle("row", transposed=True)),
        ("bert", "bert.encoder.layer.0.attention.output.dense", ROW),
        ("bert", "bert.pooler.dense", WHOLE),
        ("t5", "transformer.decoder.block.0.layer.0.SelfAttention.relative_attention_bias", TensorStyle("heads")),
        ("t5", "transformer.decoder.block.1.layer.1.EncDecAttention.o", ROW),
        ("t5", "transformer.shared", WHOLE),
    ],
)
def test_layers_are_shared_as_their_family_asks(family: str, name: str, style: TensorStyle | None) -> None:
    module = structure(family)
    module.get_submodule(name)
    assert plan_of(module).layers.get(name) == style


def test_an_adapter_is_cut_on_the_side_that_is_wide() -> None:
    with torch.device("meta"):
        lora = LoRA(r=4, target_modules=("c_attn", "c_proj"))
        module = adapted(structure("gpt2"), lora, task="causal-lm")
    layers = plan_of(module).layers
    attention = "base_model.model.transformer.h.1.attn"
    assert layers[f"{attention}.c_attn.base_layer"] == TensorStyle("column", blocks=3, transposed=True)
    assert layers[f"{attention}.c_attn.lora_B.default"] == TensorStyle("column", blocks=3)
    assert layers[f"{attention}.c_proj.lora_A.default"] == ROW
    assert not {f"{attention}.c_attn.lora_A.default", f"{attention}.c_proj.lora_B.default"} & layers.keys()
    assert layers["base_model.model.transformer.h.1.mlp.c_fc"] == TensorStyle("column", transposed=True)


@pytest.mark.parametrize(
    ("family", "changes", "most"),
    [
        ("llama", {}, 2),
        ("llama", {"num_key_value_heads": 4}, 4),
        ("llama", {"num_key_value_heads": 4, "intermediate_size": 66}, 2),
        ("llama", {"vocab_size": 95}, 2),
        ("gpt2", {}, 4),
        ("t5", {}, 4),
        ("distilbert", {}, 4),
    ],
)
def test_sizes_must_divide_heads_and_widths_but_not_the_vocabulary(
    family: str, changes: dict[str, int], most: int
) -> None:
    assert limit(structure(family, **changes)) == (most, "")


def test_what_nothing_divides_is_told_with_its_numbers() -> None:
    most, reason = limit(structure("gemma", num_key_value_heads=1))
    assert most == 1
    assert "attention heads 4, key/value heads 1" in reason


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mixtral", {}, r"its model\.layers\.\*\.mlp\.experts.* are shared as 'moe_tp_experts'"),
        ("qwen2_moe", {}, r"its model\.layers\.\*\.mlp\.experts.* are shared as 'moe_tp_experts'"),
    ],
)
def test_a_style_that_raytx_lacks_is_refused(family: str, changes: dict[str, Any], reason: str) -> None:
    module = structure(family, **changes)
    with pytest.raises(RecipeError, match=rf"'{family}' cannot be cut over tensor-parallel ranks: {reason}.*ZeRO"):
        plan_of(module)
    assert limit(module)[0] == 1


def test_a_norm_that_a_plan_forgets_is_refused() -> None:
    """Phi can norm the queries of its heads; transformers' plan says nothing of it, and no gradient would be summed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {key: value for key, value in CAUSAL["llama"].items() if key != "num_key_value_heads"}
    for norms in (False, True):
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi", **shape, qk_layernorm=norms))
        assert ("leaves out model.layers.0.self_attn.q_layernorm" in limit(module)[1]) is norms


def test_a_family_without_a_plan_is_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(RecipeError, match=r"'bloom' cannot be cut .* no tensor-parallel plan .* fsdp and ZeRO"):
        plan_of(module)
