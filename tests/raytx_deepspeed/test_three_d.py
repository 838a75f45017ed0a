"""The words for three dimensions, and what is refused before anything is started."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from raytx.components import ModelSize
from raytx.errors import RecipeError
from raytx.layout import Layout
from raytx.plan import resolve
from raytx.recipe import parse
from raytx_deepspeed.three_d import DeepSpeed3D

SIZE = ModelSize(
    parameters=100,
    trainable=100,
    layers=4,
    hidden_size=8,
    vocab_size=10,
    pieces=(30, 10, 10, 10, 10, 30),
    not_pipelined="",
    tensor_parallel=4,
    not_tensor_parallel="",
)
DECODER = {
    "type": "hf",
    "task": "causal-lm",
    "config": {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 320,
    },
    "tokenizer": {"train": "bpe"},
}
ENCODER = {
    "type": "hf",
    "task": "sequence-classification",
    "config": {
        "model_type": "bert",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 320,
    },
    "tokenizer": {"train": "bpe"},
}


def recipe(workers=2, **values):
    plain = {
        "name": "three-d",
        "model": DECODER,
        "data": {"type": "text-files"},
        "strategy": {"type": "deepspeed-3d"},
        "scaling": {"num_workers": workers},
        "train": {"global_batch_size": 16, "micro_batch_size": 1, "max_length": 32},
    }
    return parse(plain).override({key.replace("__", "."): value for key, value in values.items()})


def three_d(**fields):
    return {"type": "deepspeed-3d", **fields}


# ---- layout


def test_workers_left_over_by_stages_and_parts_hold_copies():
    config = DeepSpeed3D(pipeline_parallel_size=2, tensor_parallel_size=2)
    assert config.layout(8) == Layout(data_parallel_size=2, tensor_parallel_size=2, pipeline_parallel_size=2)


@pytest.mark.parametrize(("workers", "near"), [(6, "4 or 8"), (2, "Use 4 workers")])
def test_workers_that_do_not_divide_are_refused_with_those_that_do(workers, near):
    with pytest.raises(RecipeError, match=f"num_workers={workers} .*{near}"):
        DeepSpeed3D(pipeline_parallel_size=2, tensor_parallel_size=2).layout(workers)


# ---- fields


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_stages_that_shard_gradients_are_refused_with_what_has_them(stage):
    with pytest.raises(ValidationError, match="type=deepspeed, which has stage 2 and 3"):
        DeepSpeed3D(stage=stage)


@pytest.mark.parametrize("starts", [(0,), (1, 2), (0, 0), (2, 0), (0, 1, 2)])
def test_a_partition_must_name_the_first_piece_of_each_stage(starts):
    with pytest.raises(ValidationError, match="first piece of each of 2 stages"):
        DeepSpeed3D(pipeline_parallel_size=2, partition=starts)


# ---- stages


def test_stages_are_balanced_by_parameters():
    config = DeepSpeed3D(pipeline_parallel_size=2)
    assert config.stages(Layout(pipeline_parallel_size=2), SIZE) == ((0, 3), (3, 6))


def test_stages_may_be_given():
    config = DeepSpeed3D(pipeline_parallel_size=3, partition=[0, 1, 5])
    assert config.stages(Layout(pipeline_parallel_size=3), SIZE) == ((0, 1), (1, 5), (5, 6))


def test_the_plan_tells_the_stages_and_each_one_has_its_own_bytes():
    plan = resolve(recipe(strategy=three_d(partition=[0, 2])))
    assert plan.stages == ((0, 2), (2, 6))
    assert plan.memory[0].parameters < plan.memory[1].parameters


# ---- refusals


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pipeline_parallel_size": 7}, "more than the 6 pieces"),
        ({"pipeline_parallel_size": 2, "partition": [0, 6]}, "the model has 0 to 5"),
        ({"tensor_parallel_size": 3}, "Allowed: 1, 2, 4"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_what_would(fields, words):
    config = DeepSpeed3D(**fields)
    assert words in config.misfit(recipe(), Layout(), SIZE)


def test_a_model_without_pieces_or_parts_is_refused_with_its_own_reason():
    whole = ModelSize(parameters=1, trainable=1, layers=1, hidden_size=1, vocab_size=1, pieces=(1, 1))
    assert whole.not_pipelined in DeepSpeed3D().misfit(recipe(), Layout(), whole)
    cut = ModelSize(parameters=1, trainable=1, layers=1, hidden_size=1, vocab_size=1, pieces=(1, 1), not_pipelined="")
    assert cut.not_tensor_parallel in DeepSpeed3D(tensor_parallel_size=2).misfit(recipe(), Layout(), cut)
    assert DeepSpeed3D().misfit(recipe(), Layout(), cut) is None


def test_an_encoder_is_refused_with_what_would_work_instead():
    with pytest.raises(RecipeError, match=r"causal-lm only.*fsdp"):
        resolve(recipe(model=ENCODER))


def test_half_precision_needs_the_stage_that_keeps_masters():
    with pytest.raises(RecipeError, match="use stage 1"):
        resolve(recipe(strategy=three_d(stage=0), train__precision="bf16"))
    assert resolve(recipe(train__precision="bf16"))


@pytest.mark.parametrize("stage", [0, 1])
def test_an_optimizer_that_needs_whole_parameters_is_refused(stage):
    with pytest.raises(RecipeError, match="adafactor"):
        resolve(recipe(strategy=three_d(stage=stage), optim={"type": "adafactor"}))


# ---- DeepSpeed's JSON


def test_the_json_says_where_each_value_came_from():
    plan = resolve(recipe(8, strategy=three_d(tensor_parallel_size=2)))
    settings = DeepSpeed3D(tensor_parallel_size=2).engine_config(plan)
    assert settings["gradient_accumulation_steps"][0] == 8
    assert settings["train_batch_size"] == (16, "train.global_batch_size")
    assert settings["zero_optimization"][0]["stage"] == 1
