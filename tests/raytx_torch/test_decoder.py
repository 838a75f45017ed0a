"""The small decoder of our own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from raytx.registry import registry
from raytx_torch import decoder_model
from raytx_torch.decoder_model import RaytxDecoderConfig, RaytxDecoderForCausalLM

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 300,
}


@pytest.fixture
def module() -> Any:
    """A decoder whose weights are spread so that next tokens differ."""
    decoder_model.register()
    torch.manual_seed(0)
    module = RaytxDecoderForCausalLM(RaytxDecoderConfig(**SHAPE))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return module.eval()


def test_the_auto_classes_load_what_it_saved(module: Any, tmp_path: Path) -> None:
    module.save_pretrained(tmp_path)
    decoder_model.register()
    assert type(AutoConfig.from_pretrained(tmp_path)) is RaytxDecoderConfig
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(ids).logits, module(ids).logits)
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(base(ids).last_hidden_state, module.model(ids).last_hidden_state)


def test_embeddings_are_tied_and_written_once(module: Any, tmp_path: Path) -> None:
    from safetensors import safe_open

    assert module.lm_head.weight is module.model.embed_tokens.weight
    module.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in set(file.keys())


def test_generation_with_a_cache_equals_generation_without(module: Any) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    cached = module.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, module.generate(ids, use_cache=False, **options))
    assert len(set(cached[0].tolist())) > 4


def test_a_token_sees_none_that_come_later(module: Any) -> None:
    one, other = (module(torch.tensor([[5, 6, 7, last]])).logits for last in (8, 9))
    assert torch.equal(one[:, :3], other[:, :3])
    assert not torch.equal(one[:, 3], other[:, 3])


def test_only_the_distance_between_tokens_matters(module: Any) -> None:
    ids, positions = torch.tensor([[5, 6, 7, 8]]), torch.arange(4)[None]
    near = module(ids, position_ids=positions).logits
    far = module(ids, position_ids=positions + 30).logits
    assert (near - far).abs().max() <= 1e-4
    stretched = module(ids, position_ids=torch.tensor([[0, 1, 2, 5]]), attention_mask=torch.ones_like(ids)).logits
    assert (near - stretched).abs().max() > 1e-2


def test_eager_and_sdpa_attention_agree(module: Any) -> None:
    eager = RaytxDecoderForCausalLM._from_config(module.config, attn_implementation="eager").eval()
    eager.load_state_dict(module.state_dict())
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    one, other = (m(ids, attention_mask=mask).logits for m in (module, eager))
    assert (one - other)[mask == 1].abs().max() <= 1e-5


def test_shared_key_value_heads_equal_separate_ones_with_the_same_weights(module: Any) -> None:
    wide = RaytxDecoderForCausalLM(RaytxDecoderConfig(**SHAPE | {"num_key_value_heads": 4})).eval()
    state = module.state_dict()
    for name in [name for name in state if "k_proj" in name or "v_proj" in name]:
        state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    wide.load_state_dict(state)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert (wide(ids).logits - module(ids).logits).abs().max() <= 1e-5


def test_residual_projections_start_smaller_the_deeper_the_model() -> None:
    torch.manual_seed(0)
    module = RaytxDecoderForCausalLM(RaytxDecoderConfig(**SHAPE | {"hidden_size": 128, "num_hidden_layers": 8}))
    layer = module.model.layers[0]
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
        assert projection.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_it_exports_with_dynamic_shapes(module: Any) -> None:
    from torch.export import Dim

    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    shapes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    program = torch.export.export(
        module,
        (),
        {"input_ids": ids, "attention_mask": mask, "use_cache": False},
        dynamic_shapes={"input_ids": shapes, "attention_mask": shapes, "use_cache": None},
    )
    ids, mask = torch.randint(0, 300, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    exported = program.module()(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert (exported - module(ids, attention_mask=mask).logits).abs().max() <= 1e-5


@pytest.mark.parametrize(("key", "value"), [("num_attention_heads", 5), ("num_key_value_heads", 3)])
def test_heads_that_do_not_divide_are_refused(key: str, value: int) -> None:
    from raytx.errors import RecipeError

    component = registry().parse("model", {"type": "decoder", **SHAPE, key: value})
    with pytest.raises(RecipeError, match="num_attention_heads"):
        component.size()


def test_the_component_names_the_plugin_it_builds_on() -> None:
    component = registry().parse("model", {"type": "decoder", **SHAPE})
    assert component.plugins == ("raytx_hf",)
    assert component.provides == {"save_pretrained", "generate"}


def test_its_config_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, raytx_torch; sys.exit(bool({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
