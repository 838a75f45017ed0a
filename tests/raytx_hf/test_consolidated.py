"""A public directory is made group by group, and is what transformers would have written of the whole model."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from raytx.errors import CheckpointError, RecipeError
from raytx_hf import consolidated

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100}
QWEN = {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 16, **SIZES}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, **SIZES}
TASK = SimpleNamespace(protocol="none")


def made(config, targets=None, *, meta=False):
    """Build a model with random weights, adapters included, or its structure alone."""
    values = dict(config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if targets is None:
            return module
        return get_peft_model(
            module,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=4,
                lora_alpha=12,
                init_lora_weights=False,
                target_modules=targets,
                fan_in_fan_out=config.model_type == "gpt2",
            ),
        )


def halves(module):
    """Return what a checkpoint of a module would hold, and the reader of everything else."""
    state = {name: tensor.detach().clone().numpy() for name, tensor in module.state_dict().items()}
    trained = {name: state.pop(name) for name, value in module.named_parameters() if value.requires_grad}
    return trained, state.__getitem__


CASES = {
    "one layer of the model is one of the file": ({"model_type": "llama", **SIZES}, None),
    "a tie": (GPT2, None),
    "experts that the model holds as one": (MIXTRAL, None),
    "experts under a renamed layer": (QWEN, None),
    "projections that the file holds as one": ({"model_type": "hrm_text", **SIZES}, None),
    "adapters": ({"model_type": "gpt_neox", **SIZES}, ["query_key_value"]),
    "adapters on transposed layers": (GPT2, ["c_attn", "c_proj"]),
    "an adapter on a tied head": (GPT2, ["c_attn", "lm_head"]),
    "adapters on both ends of a tie": (GPT2, ["wte", "lm_head"]),
    "adapters among experts": (MIXTRAL, ["q_proj", "gate"]),
}


@pytest.mark.filterwarnings("ignore:Model with .tie_word_embeddings=True.", "ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("case", CASES)
def test_tensors_are_those_that_save_pretrained_writes_bit_for_bit(case, tmp_path):
    config, targets = CASES[case]
    module, structure = made(config, targets), made(config, targets, meta=True)
    groups = consolidated.whole(structure, *halves(module), tmp_path / "ours", task=TASK, dtype="float32")
    (module.merge_and_unload(safe_merge=True) if targets else module).save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    ours = {name: array for group in groups for name, array in group.make()}
    assert sum(len(group.headers) for group in groups) == len(ours)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value.numpy(), err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_headers_tell_names_shapes_and_types_before_a_number_is_read(dtype, tmp_path):
    def untouched(name):
        raise AssertionError(f"{name} was read")

    module = made(MIXTRAL)
    trained, _ = halves(module)
    structure = made(MIXTRAL, meta=True)
    announced = consolidated.whole(structure, trained.fromkeys(trained), untouched, tmp_path, task=TASK, dtype=dtype)
    groups = consolidated.whole(structure, trained, untouched, tmp_path, task=TASK, dtype=dtype)
    for told, group in zip(announced, groups, strict=True):
        arrays = dict(group.make())
        assert list(arrays) == list(told.headers)
        for name, array in arrays.items():
            assert array.shape == told.headers[name].shape
            assert told.headers[name].dtype == {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]


def test_the_structure_is_left_as_it_was(tmp_path):
    module, structure = made(GPT2, ["c_attn"]), made(GPT2, ["c_attn"], meta=True)
    before = {name: (id(tensor), tensor.dtype) for name, tensor in structure.state_dict(keep_vars=True).items()}
    consolidated.whole(structure, *halves(module), tmp_path, task=TASK, dtype="bfloat16")
    after = {name: (id(tensor), tensor.dtype) for name, tensor in structure.state_dict(keep_vars=True).items()}
    assert after == before


def test_a_trained_weight_that_the_checkpoint_lacks_is_not_taken_from_the_starting_ones(tmp_path):
    trained, _ = halves(made(GPT2))
    start = dict(trained)
    trained.pop("transformer.ln_f.bias")
    with pytest.raises(CheckpointError, match=r"lacks 1 trained parameters, 'transformer\.ln_f\.bias' for one"):
        consolidated.whole(made(GPT2, meta=True), trained, start.__getitem__, tmp_path, task=TASK, dtype="float32")


def test_a_weight_that_the_model_does_not_have_is_refused(tmp_path):
    trained, rest = halves(made(GPT2))
    with pytest.raises(CheckpointError, match="the model has no 'foreign'"):
        consolidated.whole(
            made(GPT2, meta=True), trained | {"foreign": np.zeros(3)}, rest, tmp_path, task=TASK, dtype="float32"
        )


def test_a_weight_of_another_shape_is_refused(tmp_path):
    trained, rest = halves(made(GPT2))
    trained["transformer.ln_f.bias"] = np.zeros(3, np.float32)
    groups = consolidated.whole(made(GPT2, meta=True), trained, rest, tmp_path, task=TASK, dtype="float32")
    (group,) = (group for group in groups if "transformer.ln_f.bias" in group.headers)
    with pytest.raises(CheckpointError, match=r"\(3,\) in the checkpoint, \(32,\) in the model"):
        dict(group.make())


def test_an_adapter_of_a_model_without_one_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="without an adapter"):
        consolidated.adapter(made(GPT2, meta=True), {}, dict.__getitem__, tmp_path, base=None, dtype="float32")
