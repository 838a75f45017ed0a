"""Dynamic int8: small error, plain tensors in the state dict, the same structure restored."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raytx.components import Exportable
from raytx.registry import registry
from raytx_torch.int8 import DynamicInt8
from raytx_torch.int8_linear import Int8Linear


def bert() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=96, num_labels=3, **sizes)).eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=2, n_head=4)).eval()


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((got - wanted).norm() / wanted.norm()).detach())


@pytest.mark.parametrize("make", [bert, gpt2])
def test_logits_move_by_less_than_the_default_limit(make: type) -> None:
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        wanted = make()(ids).logits
        got = DynamicInt8().build().convert(make())(ids).logits
    limit = DynamicInt8().max_relative_error
    assert limit is not None
    assert 0 < relative_error(got, wanted) < limit


def test_a_layer_equals_its_definition_up_to_the_rounding_of_its_input() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    int8 = Int8Linear.quantized(layer)
    inputs = torch.randn(16, 64)
    step = float(inputs.max().clamp(min=0) - inputs.min().clamp(max=0)) / 127  # 7 bits over the range seen
    wanted = nn.functional.linear(inputs, int8.weight * int8.scale[:, None], layer.bias)
    # Each of the 64 inputs is off by half a step at most.
    allowed = 0.51 * step * (int8.weight * int8.scale[:, None]).abs().sum(1)
    assert ((int8(inputs) - wanted).abs() <= allowed).all()


def test_weights_are_rounded_to_the_nearest_of_255_levels_of_their_row() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 8)
    int8 = Int8Linear.quantized(layer)
    off = (int8.weight * int8.scale[:, None] - layer.weight).abs()
    assert (off <= int8.scale[:, None] * 0.501).all()
    assert (int8.weight.abs().amax(1) == 127).all()


def test_a_row_of_zeros_stays_zero() -> None:
    layer = nn.Linear(16, 4, bias=False)
    nn.init.zeros_(layer.weight)
    assert torch.equal(Int8Linear.quantized(layer)(torch.randn(3, 16)), torch.zeros(3, 4))


def test_conv1d_layers_are_turned_into_the_same_layer() -> None:
    torch.manual_seed(0)
    conv = Conv1D(48, 64)
    inputs = torch.randn(2, 5, 64)
    assert relative_error(Int8Linear.quantized(conv)(inputs), conv(inputs)) < 0.05


def test_the_state_dict_goes_through_safetensors_into_a_restored_module(tmp_path: Path) -> None:
    ids = torch.arange(24).reshape(2, 12)
    converted = DynamicInt8().build().convert(bert())
    wanted = converted(ids).logits
    save_file(converted.state_dict(), tmp_path / "model.safetensors")
    restored = DynamicInt8().build().restore(BertForSequenceClassification(converted.config).eval())
    restored(ids)  # packs weights that are not the final ones
    restored.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(restored(ids).logits, wanted)


def test_the_hugging_face_export_writes_and_loads_it(tmp_path: Path) -> None:
    texts = ["the quick brown fox", "import os", "jumps over the lazy dog", "print(x)"]
    rows = [{"text": text, "label": str(place % 2)} for place, text in enumerate(texts)]
    config = {"model_type": "bert", "vocab_size": 120, "hidden_size": 32, "intermediate_size": 64}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 4}
    fields = {"task": "sequence-classification", "config": config, "tokenizer": {"train": "wordpiece"}}
    model = registry().parse("model", {"type": "hf", **fields}).build()
    model.fit(lambda: iter(rows), tmp_path, max_length=32)
    task, compressor = model.task(tmp_path), DynamicInt8().build()
    module = compressor.convert(model.merged(model.module(tmp_path)))
    batch = task.golden(list(task.features(rows, lambda index, reason: None)))
    exporter, directory = registry().parse("export", {"type": "hf"}).build(), tmp_path / "hf"
    directory.mkdir()
    exporter.save(Exportable(model, module, task, batch, card="# Card\n", compressors=[compressor]), directory)
    loaded = exporter.load(directory, model, [compressor])
    np.testing.assert_array_equal(loaded.logits(batch), model.runner(module).logits(batch))


def test_the_saved_layers_take_about_a_quarter_of_their_bytes() -> None:
    def layer_bytes(module: nn.Module) -> int:
        tensors = module.bert.encoder.state_dict().items()
        return sum(t.numel() * t.element_size() for name, t in tensors if "LayerNorm" not in name)

    assert layer_bytes(DynamicInt8().build().convert(bert())) < 0.3 * layer_bytes(bert())


def test_the_classification_head_and_tied_heads_stay_in_floating_point() -> None:
    assert type(DynamicInt8().build().convert(bert()).classifier) is nn.Linear
    module = DynamicInt8(exclude=()).build().convert(gpt2())
    assert module.lm_head.weight is module.transformer.wte.weight


def test_a_converted_module_can_be_copied_after_it_ran() -> None:
    int8 = Int8Linear.quantized(nn.Linear(32, 8))
    inputs = torch.randn(2, 32)
    assert torch.equal(copy.deepcopy(int8)(inputs), int8(inputs))
    assert torch.equal(int8(inputs), copy.deepcopy(int8)(inputs))


def test_bfloat16_inputs_give_bfloat16_outputs() -> None:
    outputs = Int8Linear.quantized(nn.Linear(32, 8)).to(torch.bfloat16)(torch.randn(2, 32, dtype=torch.bfloat16))
    assert outputs.dtype is torch.bfloat16


def test_it_announces_modules_that_an_exporter_may_be_unable_to_take() -> None:
    assert DynamicInt8().provides == {"int8-modules"}
