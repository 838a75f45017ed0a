"""A pipeline's stages train what one process trains, resume to the same bits, and hand checkpoints to any layout."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from raytx.checkpoint import Checkpoint
from raytx.plan import resolve

LIMIT = 1e-5
"""Relative, per step, in fp32."""
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "vocab_size": 320,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 320}
SCHEDULE = {"train__steps": 8, "save__every": 4, "save__num_to_keep": None, "optim__max_grad_norm": 0.5}


def model(config, **fields):
    return {
        "type": "hf",
        "task": "causal-lm",
        "tokenizer": {"train": "bpe", "vocab_size": 320},
        "config": config,
        **fields,
    }


def pipeline(stages=2, **fields):
    return {"type": "deepspeed-3d", "pipeline_parallel_size": stages, **fields}


TIED = model({**LLAMA, "tie_word_embeddings": True})
ADAPTED = model(LLAMA, adapter={"type": "lora", "r": 4})
DROPPING, STILL = model(GPT2), model({**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
MODELS = {
    "tied": {"model": TIED},
    "adapted": {"model": ADAPTED},
    "unpacked": {"model": model(LLAMA, packing=False), "evaluate__every": 3, "optim__max_grad_norm": None},
}
"""Tried against one process."""
TWO_RANKS = {
    "tied": ("tied", pipeline()),
    "tied, stage 0": ("tied", pipeline(stage=0)),
    "adapted": ("adapted", pipeline()),
    "adapted, stage 0": ("adapted", pipeline(stage=0)),
    "adapted, nothing trained in the first stage": ("adapted", pipeline(partition=[0, 1])),
    "unpacked": ("unpacked", pipeline()),
    "unpacked, staged by time": ("unpacked", pipeline(partition="time")),
}
DROPOUT = {
    "two stages": {"strategy": pipeline(), "scaling__num_workers": 2},
    "stages cut elsewhere": {"strategy": pipeline(partition=[0, 3]), "scaling__num_workers": 2},
    "recomputed": {"strategy": pipeline(), "scaling__num_workers": 2, "train__activation_checkpointing": True},
    "without dropout": {"strategy": pipeline(), "scaling__num_workers": 2, "model": STILL},
}
RESUMED = ["tied", "tied, stage 0", "adapted"]


def name(label):
    return "pipeline-" + "".join(c if c.isalnum() else "-" for c in label)


def steps(rows):
    return [row for row in rows if row["kind"] == "step"]


def furthest(rows, reference, key):
    expected = {row["step"]: row[key] for row in steps(reference)}
    return max(abs(row[key] - expected[row["step"]]) / abs(expected[row["step"]]) for row in steps(rows))


def directory(recipe, step):
    return resolve(recipe).run_dir / "checkpoints" / f"step-{step:08d}"


def contents(path):
    found = Checkpoint(path)
    found._open()
    return {key: file.get_tensor(key) for key, file in found._places.items()}


@pytest.fixture(scope="module")
def references(recipe, train_one):
    """Each model on one process, which accumulates four microbatches a step and clips."""
    runs = {key: train_one(recipe(name(f"one {key}"), **SCHEDULE | values)) for key, values in MODELS.items()}
    assert sum(row["grad_norm"] > 0.5 for row in steps(runs["tied"])) > 4, "clipping must be active"
    return runs


@pytest.fixture(scope="module")
def train_one():
    """Train a recipe of one worker in this process; return what was logged."""
    from raytx import worker

    from .conftest import prepared

    def run(recipe):
        log = []
        session = worker.Session(rank=0, log=log.append, flush=lambda: None, report=lambda metrics: None)
        worker.train(prepared(recipe), session)
        return log

    return run


@pytest.fixture(scope="module")
def recipes(recipe):
    """Every recipe of two ranks, by label."""
    two = {"scaling__num_workers": 2}
    made = {
        label: recipe(name(label), strategy=strategy, **two, **SCHEDULE | MODELS[key])
        for label, (key, strategy) in TWO_RANKS.items()
    }
    dropping = {"model": DROPPING, **SCHEDULE}
    return made | {label: recipe(name(label), **dropping | values) for label, values in DROPOUT.items()}


@pytest.fixture(scope="module")
def two_ranks(recipes, run_ranks):
    return dict(zip(recipes, run_ranks(list(recipes.values())), strict=True))


@pytest.fixture(scope="module")
def eight_ranks(recipe, run_ranks):
    """Two stages x two copies x two parts of each layer."""
    values = {"strategy": pipeline(tensor_parallel_size=2), "scaling__num_workers": 8, **SCHEDULE, **MODELS["tied"]}
    made = recipe(name("eight"), **values)
    return made, run_ranks([made])[0]


@pytest.fixture(scope="module")
def continued(recipe, recipes, two_ranks, eight_ranks, run_ranks, tmp_path_factory):
    """From step 4: runs of two ranks put back, and the run of eight ranks taken up by two that share layers."""
    ends = tmp_path_factory.mktemp("unbroken")
    for label in RESUMED:
        shutil.move(directory(recipes[label], 8), ends / label)
    values = {"strategy": pipeline(1, tensor_parallel_size=2), "scaling__num_workers": 2, **SCHEDULE, **MODELS["tied"]}
    taker = recipe(name("taken up by two"), **values)
    shutil.copytree(directory(eight_ranks[0], 4), directory(taker, 4))
    rows = run_ranks([*(recipes[label] for label in RESUMED), taker])
    return ends, rows[-1]


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
@pytest.mark.parametrize("label", TWO_RANKS)
def test_two_stages_give_the_numbers_of_one_process(two_ranks, references, label, key):
    rows, reference = two_ranks[label], references[TWO_RANKS[label][0]]
    assert len(steps(rows)) == len(steps(reference)) == 8
    assert furthest(rows, reference, key) <= LIMIT


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_three_dimensions_give_the_numbers_of_one_process(eight_ranks, references, key):
    assert furthest(eight_ranks[1], references["tied"], key) <= LIMIT


def test_evaluating_between_steps_on_samples_of_other_widths_gives_the_metrics_of_one_process(two_ranks, references):
    expected = [row["loss"] for row in references["unpacked"] if row["kind"] == "eval"]
    assert len(expected) == 3
    for label in ("unpacked", "unpacked, staged by time"):
        assert [row["loss"] for row in two_ranks[label] if row["kind"] == "eval"] == pytest.approx(expected, rel=LIMIT)


def test_dropout_does_not_depend_on_the_stages_or_on_recomputing(two_ranks):
    for label in ("stages cut elsewhere", "recomputed"):
        assert furthest(two_ranks[label], two_ranks["two stages"], "loss") <= LIMIT
    assert furthest(two_ranks["without dropout"], two_ranks["two stages"], "loss") > 100 * LIMIT


@pytest.mark.parametrize("label", ["tied", "tied, stage 0", "adapted", "adapted, nothing trained in the first stage"])
def test_a_checkpoint_holds_what_one_process_writes(recipe, recipes, two_ranks, references, label):
    """The same names and whole shapes, tied ones once; under LoRA adapters alone. Values agree to rounding."""
    key = TWO_RANKS[label][0]
    expected = contents(directory(recipe(name(f"one {key}"), **SCHEDULE | MODELS[key]), 4))
    saved = contents(directory(recipes[label], 4))
    assert saved.keys() == expected.keys()
    assert key != "adapted" or all("lora_" in name for name in saved)
    for tensor, value in expected.items():
        np.testing.assert_allclose(saved[tensor], value, rtol=2e-3, atol=1e-5, err_msg=tensor)


@pytest.mark.parametrize("label", RESUMED)
def test_a_continued_run_ends_in_the_same_bits(recipes, continued, label):
    before, after = contents(continued[0] / label), contents(directory(recipes[label], 8))
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(value, after[key], err_msg=key)


def test_two_ranks_that_share_layers_take_up_the_run_of_eight(continued, references):
    assert [row["step"] for row in steps(continued[1])] == [5, 6, 7, 8]
    assert furthest(continued[1], references["tied"], "loss") <= LIMIT
    assert furthest(continued[1], references["tied"], "grad_norm") <= LIMIT


def test_one_process_takes_up_the_run_of_eight(recipe, eight_ranks, train_one, references):
    taker = recipe(name("taken up by one"), **SCHEDULE | MODELS["tied"])
    shutil.copytree(directory(eight_ranks[0], 4), directory(taker, 4))
    rows = train_one(taker)
    assert [row["step"] for row in steps(rows)] == [5, 6, 7, 8]
    assert furthest(rows, references["tied"], "loss") <= LIMIT
