"""Bytes per rank: arithmetic that adds up over stages, and the bytes that torch really holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raytx.components import ModelSize, Shares
from raytx.memory import Memory, estimate, estimate_stages
from raytx.sections import Optim

SIZE = ModelSize(
    parameters=1000 * 64 + 4 * 50_000 + 64_064,
    trainable=1000 * 64 + 4 * 50_000 + 64_064,
    layers=4,
    hidden_size=64,
    vocab_size=1000,
    pieces=(64_000, 50_000, 50_000, 50_000, 50_000, 64_064),
)
STEP: dict[str, Any] = {
    "micro_batch_size": 2,
    "max_length": 16,
    "precision": "fp32",
    "activation_checkpointing": False,
}
TOKENS = 2 * 16


def whole(**changes: Any) -> Memory:
    return estimate(SIZE, Shares(), **STEP | changes)


def staged(
    *stages: tuple[int, int], size: ModelSize = SIZE, accumulation: int = 8, **changes: Any
) -> tuple[Memory, ...]:
    return estimate_stages(size, Shares(), stages=stages, gradient_accumulation_steps=accumulation, **STEP | changes)


@pytest.mark.parametrize(
    ("optim", "each"),
    [
        (Optim(), 8),
        (Optim(type="sgd"), 0),
        (Optim(type="sgd", momentum=0.9), 4),
        (Optim(type="adamw_8bit"), 2 + 2 * 4 / 256),
        (Optim(type="adafactor"), 4 * 2 / 64),
    ],
    ids=lambda value: getattr(value, "type", None),
)
def test_the_optimizer_takes_what_its_state_takes(optim: Optim, each: float) -> None:
    assert whole(optim=optim).optimizer == int(each * SIZE.trainable)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_halves_the_working_copies_and_adds_masters(precision: str) -> None:
    full, half = whole(), whole(precision=precision)
    assert (half.parameters * 2, half.gradients * 2) == (full.parameters, full.gradients)
    assert half.activations < full.activations
    assert half.optimizer == full.optimizer + 4 * SIZE.trainable


def test_stages_hold_the_model_between_them() -> None:
    found = staged((0, 2), (2, 3), (3, 6))
    assert [memory.parameters for memory in found] == [4 * 114_000, 4 * 50_000, 4 * 164_064]
    for name in ("parameters", "gradients", "optimizer"):
        assert sum(getattr(memory, name) for memory in found) == getattr(whole(), name)


def test_one_stage_is_no_pipeline() -> None:
    assert staged((0, 6)) == (whole(),)


def test_a_stage_keeps_the_microbatches_that_are_under_way_behind_it() -> None:
    layer = 17 * 4 * TOKENS * 64
    found = staged((0, 2), (2, 3), (3, 4), (4, 6))
    assert [memory.activations for memory in found[:3]] == [4 * layer, 3 * layer, 2 * layer]
    assert found[3].activations == layer + 3 * 4 * TOKENS * 1000


def test_no_more_microbatches_are_under_way_than_a_step_has() -> None:
    first, second = staged((0, 3), (3, 6), accumulation=1)
    assert first.activations == 2 * 17 * 4 * TOKENS * 64
    assert second.activations == staged((0, 3), (3, 6), accumulation=8)[1].activations


def test_recomputing_keeps_a_hidden_state_a_microbatch_and_one_layer_at_a_time() -> None:
    hidden = 4 * TOKENS * 64
    first, _ = staged((0, 3), (3, 6), activation_checkpointing=True)
    assert first.activations == 2 * 2 * hidden + 17 * hidden


def test_adapters_are_trained_where_the_layers_are() -> None:
    adapted = replace(SIZE, trainable=4_000)
    found = staged((0, 1), (1, 4), (4, 6), size=adapted)
    assert [memory.gradients for memory in found] == [0, 4 * 3_000, 4 * 1_000]


def test_shares_divide_within_a_stage() -> None:
    (first, *_) = estimate_stages(
        SIZE, Shares(parameters=2, optimizer=4), stages=[(0, 3), (3, 6)], gradient_accumulation_steps=8, **STEP
    )
    alone = staged((0, 3), (3, 6))[0]
    assert (first.parameters * 2, first.optimizer * 4) == (alone.parameters, alone.optimizer)
    assert (first.gradients, first.activations) == (alone.gradients, alone.activations)


@pytest.mark.parametrize(
    "optim", [Optim(), Optim(type="sgd", momentum=0.9), Optim(type="sgd"), Optim(type="adafactor")], ids=str
)
def test_the_estimate_is_what_torch_keeps_of_square_matrices(optim: Optim) -> None:
    import torch

    from raytx.optimizer import build

    weights = [torch.nn.Parameter(torch.ones(64, 64)) for _ in range(3)]
    torch_optimizer = build(optim, [{"params": weights}], device_type="cpu")
    sum(weight.sum() for weight in weights).backward()
    torch_optimizer.step()
    kept = [tensor for state in torch_optimizer.state.values() for name, tensor in state.items() if name != "step"]
    size = replace(SIZE, parameters=3 * 64 * 64, trainable=3 * 64 * 64)
    assert estimate(size, Shares(), optim=optim, **STEP).optimizer == sum(tensor.nbytes for tensor in kept)
