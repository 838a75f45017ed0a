"""The numbers do not depend on the machines: loss and gradient norm of every strategy, held to one process."""

from __future__ import annotations

import pytest

ZERO = [{"type": "deepspeed", "stage": stage} for stage in range(4)]
TWO_RANKS = [{"type": "ddp"}, *ZERO]
LIMIT = 1e-5
"""Relative, per step, in fp32: rounding of sums in another order, carried through twenty updates."""


def label(strategy):
    return "-".join(str(value) for value in strategy.values())


def steps(rows):
    return [row for row in rows if row["kind"] == "step"]


def furthest(rows, reference, key):
    pairs = list(zip(steps(rows), steps(reference), strict=True))
    assert len(pairs) == 20
    return max(abs(ours[key] - theirs[key]) / abs(theirs[key]) for ours, theirs in pairs)


@pytest.fixture(scope="module")
def reference(recipe, run_ranks):
    """One process, accumulating four microbatches a step, clipping most of the time."""
    (rows,) = run_ranks([recipe("reference")])
    assert steps(rows)[-1]["loss"] < 0.8 * steps(rows)[0]["loss"]
    assert sum(row["grad_norm"] > 0.5 for row in steps(rows)) > 10, "clipping must be active for the test to mean much"
    return rows


@pytest.fixture(scope="module")
def two_ranks(recipe, run_ranks):
    recipes = [recipe(f"two-{label(s)}", strategy=s, scaling__num_workers=2) for s in TWO_RANKS]
    return dict(zip(map(label, TWO_RANKS), run_ranks(recipes), strict=True))


@pytest.mark.parametrize("strategy", map(label, TWO_RANKS))
@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_two_ranks_give_the_numbers_of_one_process(two_ranks, reference, strategy, key):
    assert furthest(two_ranks[strategy], reference, key) <= LIMIT


def test_held_out_metrics_do_not_depend_on_the_ranks(two_ranks, reference):
    (expected,) = [row for row in reference if row["kind"] == "eval"]
    for rows in two_ranks.values():
        (measured,) = [row for row in rows if row["kind"] == "eval"]
        assert measured["loss"] == pytest.approx(expected["loss"], rel=LIMIT)


def test_four_ranks_give_the_numbers_of_one_process(recipe, run_ranks, reference):
    strategies = [{"type": "ddp"}, {"type": "deepspeed", "stage": 2}]
    recipes = [recipe(f"four-{label(s)}", strategy=s, scaling__num_workers=4) for s in strategies]
    for rows in run_ranks(recipes):
        assert furthest(rows, reference, "loss") <= LIMIT
        assert furthest(rows, reference, "grad_norm") <= LIMIT


def test_dropout_is_the_same_on_any_number_of_ranks(corpus, storage, recipe, run_ranks):
    model = {
        "type": "hf",
        "task": "causal-lm",
        "config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 320},
        "tokenizer": {"train": "bpe", "vocab_size": 320},
    }
    (one,) = run_ranks([recipe("dropout-one", model=model)])
    (two,) = run_ranks([recipe("dropout-two", model=model, strategy={"type": "ddp"}, scaling__num_workers=2)])
    assert furthest(two, one, "loss") <= LIMIT
    still = {**model, "config": {**model["config"], "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
    (without,) = run_ranks([recipe("dropout-none", model=still)])
    assert furthest(without, one, "loss") > 100 * LIMIT, "the model must have dropout for the test to mean much"


def test_activation_checkpointing_changes_no_number(recipe, run_ranks, reference):
    (rows,) = run_ranks([recipe("recomputed", train__activation_checkpointing=True)])
    assert furthest(rows, reference, "loss") <= 1e-6
    assert furthest(rows, reference, "grad_norm") <= 1e-6


def test_bf16_stays_near_fp32_under_every_strategy(recipe, run_ranks, reference):
    """Bounds of the loss: autocast keeps fp32 weights; DeepSpeed's bf16 rounds the working weights as well."""
    (autocast,) = run_ranks([recipe("bf16-single", train__precision="bf16")])
    zero = [
        recipe(
            f"bf16-zero{stage}",
            strategy={"type": "deepspeed", "stage": stage},
            scaling__num_workers=2,
            train__precision="bf16",
        )
        for stage in (1, 2, 3)
    ]
    for rows in (autocast, *run_ranks(zero)):
        assert furthest(rows, reference, "loss") <= 2e-2
