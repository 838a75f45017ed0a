"""The architecture: residual blocks of a gated causal convolution and a feed-forward layer.

A convolution has no positions to encode and no mask to take; what keeps documents apart is that a token looks no
further back than its own position. So packed documents, and padding left of a prompt, are never seen.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

Window = Tensor
"""What one convolution remembers of the tokens before: (batch, kernel_size - 1, hidden)."""


@strict
class GatedConvConfig(PreTrainedConfig):
    """Shape of the model."""

    model_type = "raytx_gated_conv"

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 6
    kernel_size: int = 8
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True


class GatedConvForCausalLM(PreTrainedModel, GenerationMixin):
    """Token ids to next-token logits, and the loss where labels are given."""

    config_class = GatedConvConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config: GatedConvConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Mixer):  # an equal say for each of the last tokens, and the variance of one
            initialization.normal_(module.taps, std=module.kernel_size**-0.5)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the cache is a list of windows, of one size however long the text

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: list[Window] | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (batch, length, vocabulary), and the mean cross entropy of labels that are not -100."""
        positions = _positions(input_ids, attention_mask) if position_ids is None else position_ids
        hidden = self.embed_tokens(input_ids)
        windows = past_key_values or [layer.mixer.empty_window(hidden) for layer in self.layers]
        kept = []
        for layer, window in zip(self.layers, windows, strict=True):
            hidden, window = layer(hidden, positions, window)
            kept.append(window)
        logits = self.lm_head(self.norm(hidden))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=kept if use_cache else None)


class Block(GradientCheckpointingLayer):
    """A convolution over tokens, then a feed-forward layer over features, each normed and added to the stream."""

    def __init__(self, config: GatedConvConfig) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.mixer = Mixer(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.up_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.down_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, positions: Tensor, window: Window) -> tuple[Tensor, Window]:
        mixed, window = self.mixer(self.mixer_norm(hidden), positions, window)
        hidden = hidden + mixed
        return hidden + self.down_proj(nn.functional.silu(self.up_proj(self.mlp_norm(hidden)))), window


class Mixer(nn.Module):
    """A weighted sum of each feature over the last tokens of its document, gated by the current token."""

    def __init__(self, config: GatedConvConfig) -> None:
        super().__init__()
        self.kernel_size = config.kernel_size
        self.in_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.taps = nn.Parameter(torch.empty(config.kernel_size, config.hidden_size))  # row n: the token n places back
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, positions: Tensor, window: Window) -> tuple[Tensor, Window]:
        """Mix (batch, length, hidden) at positions (batch or 1, length) in their document."""
        gate, value = self.in_proj(hidden).chunk(2, dim=-1)
        length = value.shape[1]
        extended = torch.cat((window, value), dim=1)
        mixed = torch.zeros_like(value)
        for back in range(self.kernel_size):
            start = self.kernel_size - 1 - back
            inside = (positions >= back)[..., None].to(value.dtype)
            mixed = mixed + self.taps[back] * inside * extended[:, start : start + length]
        return self.out_proj(nn.functional.silu(gate) * mixed), extended[:, length:]

    def empty_window(self, hidden: Tensor) -> Window:
        return hidden.new_zeros(hidden.shape[0], self.kernel_size - 1, hidden.shape[2])


def _positions(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Count the tokens of each row from 0, padding aside; of a longer mask only the last columns are asked for."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]


def register() -> None:
    """Make the Auto classes know the architecture. May be called any number of times."""
    AutoConfig.register(GatedConvConfig.model_type, GatedConvConfig, exist_ok=True)
    AutoModelForCausalLM.register(GatedConvConfig, GatedConvForCausalLM, exist_ok=True)
