"""Bytes that one rank holds, by component, before anything is allocated."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from raytx.components import ModelSize, Shares

FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes per rank. Activations are an estimate, the rest is arithmetic."""

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
) -> Memory:
    """Estimate the bytes of one rank.

    Parameters and gradients count 4 bytes each; under bf16 the working copies count 2 and an fp32 master of every
    trained parameter is added to the optimizer's two moments (Rajbhandari et al. 2020, section 3.1). Activations follow
    Korthikanti et al. 2022, equation 1 without the attention scores, which fused attention does not keep: 34 bytes per
    token, hidden unit and layer at two bytes a value, or one hidden state a layer with checkpointing; and the logits
    with their softmax in fp32.
    """
    value = 2 if precision == "bf16" else FP32
    masters = FP32 * size.trainable if precision == "bf16" else 0
    tokens = micro_batch_size * max_length
    per_layer = value if activation_checkpointing else 17 * value
    activations = tokens * size.hidden_size * size.layers * per_layer + 3 * FP32 * tokens * size.vocab_size
    if activation_checkpointing:
        activations += 17 * value * tokens * size.hidden_size  # the one layer being recomputed
    return Memory(
        parameters=value * size.parameters // shares.parameters,
        gradients=value * size.trainable // shares.gradients,
        optimizer=(2 * FP32 * size.trainable + masters) // shares.optimizer,
        activations=activations // shares.activations,
    )
