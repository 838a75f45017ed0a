"""Starting weights: the same whatever is read, in whatever order, and what the files and the architecture say."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from raytx.errors import RecipeError
from raytx_hf.model import HFModel
from raytx_hf.weights import Drawn, Stored, reader

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TINY, "num_key_value_heads": 2}
DECODERS = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma": {**GROUPED, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": TINY,
    "mixtral": {**GROUPED, "num_local_experts": 4},
}
ENCODERS = {
    "bert": TINY,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 64},
    "t5": {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 64, "d_kv": 8, "vocab_size": 64},
}
FAMILIES = DECODERS | ENCODERS


def built(family, seed=None):
    config = AutoConfig.for_model(family, **FAMILIES[family])
    auto = AutoModelForCausalLM if family in DECODERS else AutoModelForSequenceClassification
    if seed is not None:
        torch.manual_seed(seed)
    return auto.from_config(config, dtype=torch.float32)


def structure(family):
    with torch.device("meta"):
        return built(family)


def tensors(module):
    return dict([*module.named_parameters(), *module.named_buffers()])


def never():
    raise AssertionError("the whole model was built")


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_weights_are_distributed_as_the_architecture_initialises_them(family):
    drawn = Drawn(structure(family), never, seed=3)
    for name, expected in tensors(built(family, seed=0)).items():
        value = drawn(name)
        assert (value.shape, value.dtype) == (expected.shape, expected.dtype)
        if expected.numel() > 500 and expected.is_floating_point():
            assert float(value.mean()) == pytest.approx(
                float(expected.detach().mean()), abs=0.2 * expected.std().item()
            )
            assert float(value.std()) == pytest.approx(expected.std().item(), rel=0.2), name
        elif name.endswith(("norm.weight", "bias", "inv_freq", "position_ids")):
            assert torch.equal(value, expected), name


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_drawn_weights_depend_on_seed_and_name_but_not_on_the_order_of_reading(family):
    one, other, third = (Drawn(structure(family), never, seed=seed) for seed in (3, 3, 4))
    names = list(dict(structure(family).named_parameters()))
    values = {name: one(name) for name in names}
    for name in reversed(names):
        assert torch.equal(other(name), values[name])
    assert not torch.equal(third(names[0]), values[names[0]])
    alike = [
        n for n in names[1:] if values[n].shape == values[names[0]].shape and torch.equal(values[n], values[names[0]])
    ]
    assert not alike


def test_reading_draws_nothing_from_the_generator_that_training_uses():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Drawn(structure("llama"), never, seed=1)("model.embed_tokens.weight")
    assert torch.equal(torch.rand(3), expected)


def test_a_structure_stays_on_the_meta_device_when_its_weights_are_read():
    module = structure("gpt2")
    drawn = Drawn(module, never, seed=0)
    for name in tensors(module):
        drawn(name)
    assert all(tensor.is_meta for tensor in tensors(module).values())


def test_values_that_only_a_constructor_sets_come_from_a_whole_model_built_once():
    def with_scale(module):
        module.model.register_parameter("scale", torch.nn.Parameter(torch.full((3,), 7.0)))
        return module

    count = []
    with torch.device("meta"):
        module = with_scale(built("llama"))
    drawn = Drawn(module, lambda: count.append(1) or with_scale(built("llama")), seed=0)
    assert drawn("model.scale").tolist() == [7.0, 7.0, 7.0]
    drawn("model.norm.weight")
    drawn("model.scale")
    assert len(count) == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", ["one file", "several"])
def test_stored_weights_are_what_transformers_loads(family, shards, tmp_path):
    module = built(family, seed=1)
    module.save_pretrained(tmp_path, max_shard_size="20KB" if shards == "several" else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "several")
    auto = AutoModelForCausalLM if family in DECODERS else AutoModelForSequenceClassification
    expected = tensors(auto.from_pretrained(tmp_path, dtype=torch.float32))
    task = "causal-lm" if family in DECODERS else "sequence-classification"
    stored = Stored(HFModel(task=task, path=str(tmp_path)), structure(family), Drawn(structure(family), never, seed=0))
    for name, value in expected.items():
        assert torch.equal(stored(name), value), name


def test_a_base_model_serves_a_task_and_its_new_head_is_drawn(tmp_path):
    built("bert", seed=1).base_model.save_pretrained(tmp_path)
    drawn = Drawn(structure("bert"), never, seed=0)
    stored = Stored(HFModel(task="sequence-classification", path=str(tmp_path)), structure("bert"), drawn)
    name = "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(stored(name), dict(built("bert", seed=1).named_parameters())[name])
    assert torch.equal(stored("classifier.weight"), drawn("classifier.weight"))


def test_files_of_another_architecture_are_refused(tmp_path):
    built("gpt2").save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="its files lack"):
        Stored(
            HFModel(task="causal-lm", path=str(tmp_path)), structure("llama"), Drawn(structure("llama"), never, seed=0)
        )


def test_a_weight_of_another_shape_is_named(tmp_path):
    built("bert").save_pretrained(tmp_path)
    with torch.device("meta"):
        wider = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **TINY, num_labels=5))
    stored = Stored(HFModel(task="sequence-classification", path=str(tmp_path)), wider, Drawn(wider, never, seed=0))
    with pytest.raises(RecipeError, match=r"classifier.weight is \(2, 32\) there"):
        stored("classifier.weight")


def test_half_precision_files_are_read_as_fp32(tmp_path):
    module = built("llama", seed=1).to(torch.bfloat16)
    module.save_pretrained(tmp_path)
    read = reader(
        Stored(
            HFModel(task="causal-lm", path=str(tmp_path)), structure("llama"), Drawn(structure("llama"), never, seed=0)
        )
    )
    value = read("model.norm.weight")
    assert value.dtype == "float32"
    assert torch.equal(torch.from_numpy(value), module.model.norm.weight.float())


def test_what_older_files_hold_besides_is_passed_over(tmp_path):
    tensors = {**built("bert", seed=1).state_dict(), "bert.embeddings.position_ids": torch.arange(8)[None]}
    built("bert").save_pretrained(tmp_path)
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "model.safetensors")
    drawn = Drawn(structure("bert"), never, seed=0)
    stored = Stored(HFModel(task="sequence-classification", path=str(tmp_path)), structure("bert"), drawn)
    assert stored("bert.embeddings.position_ids").shape == structure("bert").bert.embeddings.position_ids.shape


def test_a_file_without_one_of_the_layers_is_refused(tmp_path):
    built("llama").save_pretrained(tmp_path)
    kept = {k: v.contiguous() for k, v in built("llama").state_dict().items() if ".layers.1.mlp" not in k}
    save_file(kept, tmp_path / "model.safetensors")
    drawn = Drawn(structure("llama"), never, seed=0)
    with pytest.raises(RecipeError, match=r"lack 3 of .* 'model.layers.1.mlp"):
        Stored(HFModel(task="causal-lm", path=str(tmp_path)), structure("llama"), drawn)


def test_adapters_of_embeddings_are_drawn_too(tiny, tmp_path):
    adapter = {"type": "lora", "r": 2, "target_modules": ["q_proj", "embed_tokens"]}
    config = {"model_type": "llama", **GROUPED, "vocab_size": 320}
    component = {
        "type": "hf",
        "task": "causal-lm",
        "config": config,
        "tokenizer": {"train": "bpe", "vocab_size": 320},
        "adapter": adapter,
    }
    module = tiny.prepared(component, tmp_path).module(tmp_path)
    drawn = {name: p for name, p in module.named_parameters() if "lora_embedding" in name}
    assert len(drawn) == 2
    assert all(bool(p.isfinite().all()) for p in drawn.values())
    assert any(bool(p.any()) for p in drawn.values())
