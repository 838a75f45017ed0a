"""What the strategy accepts, refuses and tells DeepSpeed, all before anything is started."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raytx.components import ModelSize, Shares
from raytx.errors import RecipeError
from raytx.layout import Layout
from raytx.plan import resolve
from raytx.recipe import parse
from raytx_deepspeed.strategy import DeepSpeed

SIZE = ModelSize(1, 1, 2, 32, 64, tensor_parallel=4, not_tensor_parallel="", not_sliced="")


def recipe(**values):
    plain = {
        "name": "job",
        "model": {"type": "hf", "task": "causal-lm", "tokenizer": {"train": "bpe"}}
        | {"config": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}},
        "data": {"type": "text-files", "path": "."},
        "train": {"global_batch_size": 8, "micro_batch_size": 2},
    }
    return parse(plain).override({key.replace("__", "."): value for key, value in values.items()})


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"stage": 2, "offload_param": "cpu"}, "offload_param needs stage 3"),
        ({"stage": 0, "offload_optimizer": "cpu"}, "offload_optimizer needs stage 1, 2 or 3"),
        ({"stage": 2, "offload_optimizer": "nvme", "nvme_path": "/d"}, "offload_optimizer=nvme needs stage 3"),
        ({"stage": 3, "offload_optimizer": "nvme"}, "nvme_path goes with"),
        ({"stage": 3, "nvme_path": "/d"}, "nvme_path goes with"),
        ({"expert_parallel_size": 2}, "must be 1: DeepSpeed's AutoEP renames"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, why):
    with pytest.raises(ValueError, match=why):
        DeepSpeed(**fields)


def test_workers_that_do_not_make_whole_replicas_are_refused():
    with pytest.raises(RecipeError, match=r"num_workers=6 is no multiple of strategy.tensor_parallel_size=2 x .*=2"):
        DeepSpeed(tensor_parallel_size=2, sequence_parallel_size=2).layout(6)


def test_ranks_are_laid_out_by_the_sizes_given():
    layout = DeepSpeed(tensor_parallel_size=2, sequence_parallel_size=3).layout(12)
    assert layout == Layout(data_parallel_size=2, tensor_parallel_size=2, sequence_parallel_size=3)


@pytest.mark.parametrize(
    ("strategy", "values", "why"),
    [
        ({"stage": 0}, {"train__precision": "bf16"}, "stage 0 keeps no fp32 masters under bf16; use stage 1"),
        ({"stage": 1}, {"optim__type": "adafactor"}, "scales each update by the norms of whole parameters"),
        (
            {"stage": 0, "tensor_parallel_size": 2},
            {"optim__type": "adafactor"},
            "scales each update by the norms of whole parameters",
        ),
        ({"sequence_parallel_size": 2}, {"model__attn_implementation": "eager"}, "it computes attention by sdpa"),
        ({"sequence_parallel_size": 2}, {"model__task": "sequence-classification"}, "only causal-lm has slices"),
    ],
)
def test_recipes_that_it_cannot_carry_out_are_refused(strategy, values, why):
    assert why in (DeepSpeed(**strategy).refusal(recipe(**values)) or "")


def test_adafactor_is_left_to_strategies_that_keep_its_state_as_torch_does():
    assert "such as ddp" in (DeepSpeed(stage=0).refusal(recipe(optim__type="adafactor")) or "")


@pytest.mark.parametrize(
    ("strategy", "size", "why"),
    [
        ({"tensor_parallel_size": 3}, SIZE, "greatest common divisor is 4; use 1, 2, 4"),
        ({"tensor_parallel_size": 2}, replace(SIZE, not_tensor_parallel="no plan"), "cannot cut this model: no plan"),
        ({"sequence_parallel_size": 8}, SIZE, "sequence_parallel_size=8 x tensor_parallel_size=1 does not divide"),
        ({"sequence_parallel_size": 2}, replace(SIZE, not_tensor_parallel="no plan"), "no plan; use 1"),
        ({"sequence_parallel_size": 2}, replace(SIZE, not_sliced="it convolves"), "it convolves; use 1"),
    ],
)
def test_models_whose_heads_do_not_divide_are_refused(strategy, size, why):
    assert why in (DeepSpeed(**strategy).misfit(recipe(), Layout(), size) or "")


def test_models_whose_heads_divide_are_taken():
    strategy = DeepSpeed(tensor_parallel_size=2, sequence_parallel_size=2)
    assert strategy.misfit(recipe(), strategy.layout(4), SIZE) is None


def test_memory_is_divided_by_what_each_stage_shards():
    layout = Layout(data_parallel_size=2, tensor_parallel_size=2, sequence_parallel_size=2)
    assert DeepSpeed(stage=1).shares(layout) == Shares(2, 2, 8, 2)
    assert DeepSpeed(stage=3).shares(layout) == Shares(8, 8, 8, 2)


def test_the_json_says_what_deepspeed_does_and_where_it_comes_from():
    strategy = {"type": "deepspeed", "stage": 3, "offload_optimizer": "cpu", "offload_param": "nvme", "nvme_path": "/d"}
    plan = resolve(recipe(strategy=strategy, scaling__num_workers=2))
    settings = {key: value for key, (value, _) in plan.recipe.strategy.engine_config(plan).items()}
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert settings["zero_optimization"]["offload_param"] == {"device": "nvme", "nvme_path": "/d"}
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 1.0
