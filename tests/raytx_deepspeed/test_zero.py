"""ZeRO gives the numbers of plain torch in one process: at every stage, cut, offloaded or resumed."""

from __future__ import annotations

from itertools import pairwise

import pytest

LIMIT = 1e-5
"""Relative, per step, in fp32."""
CUT = {"tensor_parallel_size": 2}
CPU = {"offload_optimizer": "cpu"}


def job(ranks, family="llama", **strategy):
    return {"do": "parity", "ranks": ranks, "family": family, "strategy": strategy}


SLICED = {"sequence_parallel_size": 2}
PACKED = {"packed": True}

TWO = {
    **{f"stage {stage}": job(2, stage=stage) for stage in range(4)},
    **{f"stage {stage}, tensor 2": job(2, stage=stage, **CUT) for stage in range(4)},
    **{f"stage {stage}, optimizer on the CPU": job(2, stage=stage, **CPU) for stage in (1, 2, 3)},
    "stage 3, all on the CPU": job(2, stage=3, offload_param="cpu", **CPU),
    "stage 3, activation checkpointing": job(2, stage=3) | {"activation_checkpointing": True},
    **{f"stage {stage}, LoRA": job(2, "lora", stage=stage) for stage in (0, 3)},
    "stage 3, LoRA, tensor 2": job(2, "lora", stage=3, **CUT),
    **{f"stage {stage}, mixture of experts": job(2, "mixtral", stage=stage) for stage in (1, 3)},
    "stage 3, tied, tensor 2": job(2, "tied", stage=3, **CUT),
    **{f"stage {stage}, Qwen3, tensor 2": job(2, "qwen3", stage=stage, **CUT) for stage in (2, 3)},
    "stage 1, GPT-2, tensor 2": job(2, "gpt2", stage=1, **CUT),
    "stage 2, sgd": job(2, stage=2) | {"optim": {"type": "sgd", "momentum": 0.9}},
    **{f"stage {stage}, sequence 2": job(2, stage=stage, **SLICED) for stage in (0, 3)},
    "stage 2, sequence 2, packed": job(2, stage=2, **SLICED) | PACKED,
    "stage 1, sequence 2, packed, with a window": job(2, "mistral", stage=1, **SLICED) | PACKED,
    "stage 2, sequence 2, GPT-2": job(2, "gpt2", stage=2, **SLICED),
}
FOUR = {
    **{f"stage {stage}, tensor 2, data 2": job(4, stage=stage, **CUT) for stage in range(4)},
    "stage 2, sequence 2, data 2": job(4, stage=2, **SLICED),
    "stage 3, sequence 2, tensor 2": job(4, stage=3, **SLICED, **CUT),
}
KINDS = [{"stage": 0}, {"stage": 3}, {"stage": 1, **CUT}, {"stage": 2, **CPU}, {"stage": 3, **CUT}, {"stage": 0}]
HALF = (1, 3)


def moves(family):
    """Each kind hands over to the next."""
    cases = [{"ranks": 2, "family": family, "strategy": kind} for kind in KINDS]
    return [{"do": "resume", "first": first, "then": then} for first, then in pairwise(cases)]


@pytest.fixture(scope="module")
def two(run_jobs):
    resumed = {f"{family} {n}": move for family in ("llama", "lora") for n, move in enumerate(moves(family))}
    scaled = {f"overflow {stage}": {"do": "overflow", "stage": stage} for stage in HALF}
    scaled |= {f"left out {stage}": {"do": "left_out", "stage": stage} for stage in HALF}
    held = {"held": {"do": "held", "ranks": 2, "strategy": {"stage": 3}}}
    return run_jobs(2, {**TWO, **resumed, **held, **scaled})


@pytest.fixture(scope="module")
def four(run_jobs):
    return run_jobs(4, FOUR)


@pytest.mark.parametrize("case", TWO)
def test_two_ranks_give_the_numbers_of_plain_torch(two, case):
    assert_equal_numbers(two[case])


@pytest.mark.parametrize("case", FOUR)
def test_data_and_tensor_parallel_ranks_together_give_them_too(four, case):
    assert_equal_numbers(four[case])


def assert_equal_numbers(found):
    assert found["clipped"] > 5, "clipping must be active for the test to mean much"
    assert found["loss"] <= LIMIT
    assert found["grad_norm"] <= LIMIT
    assert found["weights"] <= 2e-5
    assert found["logits"] <= 5e-5


@pytest.mark.parametrize("family", ["llama", "lora"])
@pytest.mark.parametrize("move", range(len(KINDS) - 1))
def test_a_checkpoint_of_one_kind_goes_on_under_another(two, family, move):
    found = two[f"{family} {move}"]
    assert found["same"], "what was loaded must be bit for bit what was saved"
    assert found["loss"] <= LIMIT
    assert found["grad_norm"] <= LIMIT


def test_stage_3_never_holds_the_whole_model_on_a_rank(two):
    assert two["held"]["filling"] < 0.75
    assert two["held"]["filled"] < 0.6


@pytest.mark.parametrize("stage", HALF)
def test_a_step_that_overflows_in_fp16_changes_nothing_and_halves_the_scale(two, stage):
    found = two[f"overflow {stage}"]
    skipped, done = found["rows"]
    assert (skipped["skipped"], skipped["grad_norm"], skipped["loss_scale"]) == (1.0, 0.0, 2.0**39)
    assert not found["changed"]
    assert found["scalars"] == {"loss_scale": 2.0**39, "clean_steps": 0.0, "skipped_steps": 1.0}
    assert (done["skipped"], done["loss_scale"]) == (0.0, 2.0**12)
    assert done["grad_norm"] == pytest.approx(2.62, rel=0.05)


@pytest.mark.parametrize("stage", HALF)
def test_what_is_not_finite_at_the_least_scale_or_in_the_loss_itself_is_no_matter_of_the_scale(two, stage):
    found = two[f"left out {stage}"]
    least, poisoned = found["rows"]
    assert least | {"loss": None} == {"loss": None, "grad_norm": "nan", "skipped": "0.0", "loss_scale": str(2.0**40)}
    assert poisoned == {"loss": "nan", "grad_norm": "nan", "skipped": "0.0", "loss_scale": str(2.0**12)}
    assert found["scalars"] == {"loss_scale": 2.0**12, "clean_steps": 7.0, "skipped_steps": 1.0}
    assert not found["changed"]


@pytest.mark.parametrize("name", ["stage 1", "stage 3"])
def test_ranks_that_hold_the_same_take_turns_at_handing_it_over(two, name):
    assert min(two[name]["handed"]) > 0.3 * max(two[name]["handed"])
