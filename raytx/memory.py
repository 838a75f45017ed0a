"""Bytes that one rank holds, by component, before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from raytx.components import ModelSize, Shares
from raytx.optimizer import state_bytes
from raytx.sections import Optim

FP32 = 4
ADAMW = Optim()
LAYER = 17
"""Values that a layer keeps per token and hidden unit: 34 bytes at two bytes a value in Korthikanti et al. 2022,
equation 1, without the attention scores, which fused attention does not keep."""
EMBEDDING, HEAD = 1, 1
"""Pieces of a pipeline before the layers and after them."""


@dataclass(frozen=True)
class Memory:
    """Bytes per rank. Activations are an estimate, as are the states of adafactor and adamw_8bit; the rest is exact."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations

    def to_dict(self) -> dict[str, int]:
        return asdict(self) | {"total": self.total}


def estimate(
    size: ModelSize,
    shares: Shares,
    *,
    micro_batch_size: int,
    max_length: int,
    precision: str,
    activation_checkpointing: bool,
    optim: Optim = ADAMW,
    in_flight: int = 1,
) -> Memory:
    """Estimate the bytes of one rank, which keeps the activations of `in_flight` microbatches.

    Parameters and gradients count 4 bytes each; under bf16 and fp16 the working copies count 2 and an fp32 master of
    every trained parameter is added to the optimizer's state (Rajbhandari et al. 2020, section 3.1).
    """
    half = precision != "fp32"
    value = 2 if half else FP32
    tokens = micro_batch_size * max_length
    activations = in_flight * _kept(size, tokens=tokens, value=value, checkpointing=activation_checkpointing)
    if activation_checkpointing:
        activations += LAYER * value * tokens * size.hidden_size  # the one layer being recomputed
    return Memory(
        parameters=value * size.parameters // shares.parameters,
        gradients=value * size.trainable // shares.gradients,
        optimizer=(_state(size, optim) + (FP32 * size.trainable if half else 0)) // shares.optimizer,
        activations=activations // shares.activations,
    )


def estimate_stages(
    size: ModelSize,
    shares: Shares,
    *,
    stages: Sequence[tuple[int, int]],
    gradient_accumulation_steps: int,
    micro_batch_size: int,
    max_length: int,
    precision: str,
    activation_checkpointing: bool,
    optim: Optim = ADAMW,
) -> tuple[Memory, ...]:
    """Estimate the bytes of one rank of each pipeline stage, given the pieces [first, last) that a stage holds.

    One forward, one backward (Narayanan et al. 2019): of p stages, stage s has started p - s microbatches when the
    first comes back, and keeps as many from then on. Shares are those within a stage, among its own ranks.
    """
    return tuple(
        estimate(
            _stage(size, *span),
            shares,
            micro_batch_size=micro_batch_size,
            max_length=max_length,
            precision=precision,
            activation_checkpointing=activation_checkpointing,
            optim=optim,
            in_flight=min(gradient_accumulation_steps, len(stages) - place),
        )
        for place, span in enumerate(stages)
    )


def save_bytes(size: ModelSize, *, world_size: int, optim: Optim = ADAMW) -> int:
    """Return the bytes of the host's memory in which a rank holds its share of a save that is written in the
    background: fp32 weights and the optimizer's state of what is trained, divided by the ranks."""
    return (FP32 * size.trainable + _state(size, optim)) // world_size


def _stage(size: ModelSize, first: int, last: int) -> ModelSize:
    """Return the size of some pieces. Where part of a model is frozen, what is trained is taken to lie in its layers,
    as adapters do."""
    parameters, end = sum(size.pieces[first:last]), len(size.pieces) - HEAD
    layers = max(0, min(last, end) - max(first, EMBEDDING))
    trained = parameters if size.trainable == size.parameters else size.trainable * layers // max(1, size.layers)
    return replace(
        size,
        parameters=parameters,
        trainable=trained,
        layers=layers,
        vocab_size=size.vocab_size if last > end else 0,
    )


def _state(size: ModelSize, optim: Optim) -> int:
    """The optimizer's state, as if what is trained were square matrices of the hidden size."""
    matrix = (size.hidden_size, size.hidden_size)
    return state_bytes(optim, matrix) * size.trainable // size.hidden_size**2


def _kept(size: ModelSize, *, tokens: int, value: int, checkpointing: bool) -> int:
    """Bytes that one microbatch keeps for its backward pass: every layer's, and the logits with their softmax in fp32.

    Of a layer all that the backward pass needs, or with checkpointing one hidden state.
    """
    per_layer = value if checkpointing else LAYER * value
    return tokens * size.hidden_size * size.layers * per_layer + 3 * FP32 * tokens * size.vocab_size
