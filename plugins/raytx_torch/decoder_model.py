"""A small decoder-only transformer of our own, as a Hugging Face config and model.

Pre-norm blocks (RMSNorm), rotary positions, grouped-query attention, SwiGLU, tied embeddings. Modules carry the names
that Llama-shaped models have (`model.layers.N.self_attn.q_proj`), so whatever cuts or shards those reads this one too.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine, each (batch, 1, length, head_dim)."""


@strict
class RaytxDecoderConfig(PreTrainedConfig):
    """Shape of the decoder."""

    model_type = "raytx_decoder"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 688
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def validate_architecture(self) -> None:
        """Refuse sizes that do not divide; called by `strict` after the types were checked."""
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ValueError(f"hidden_size={self.hidden_size} must split into num_attention_heads of an even width")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is no multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )


class RaytxDecoderPreTrainedModel(PreTrainedModel):
    """What the bare model and the one with a head share: capabilities and initial weights."""

    config_class = RaytxDecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        if getattr(module, "adds_to_residual", False):
            # Each block adds two terms to the residual stream; this keeps its variance independent of depth
            # (GPT-2, Radford et al. 2019, section 2.3).
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            initialization.normal_(module.weight, mean=0.0, std=std)
        else:
            super()._init_weights(module)


class RaytxDecoderModel(RaytxDecoderPreTrainedModel):
    """Token ids to hidden states."""

    def __init__(self, config: RaytxDecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Positions that restart at 0 begin a new document, where neither mask nor cache is given."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self._caches(use_cache) and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + seen)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotation = rotary(position_ids, head_dim=self.config.head_dim, theta=self.config.rope_theta, dtype=hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, rotation=rotation, attention_mask=mask, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)

    def _caches(self, use_cache: bool | None) -> bool:
        """A recomputed block would append its keys to a cache twice, so checkpointed training never fills one."""
        wanted = self.config.use_cache if use_cache is None else use_cache
        return wanted and not (self.gradient_checkpointing and self.training)


class RaytxDecoderForCausalLM(RaytxDecoderPreTrainedModel, GenerationMixin):
    """Token ids to next-token logits, and the loss where labels are given."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: RaytxDecoderConfig) -> None:
        super().__init__(config)
        self.model = RaytxDecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (batch, length, vocabulary), and the mean cross entropy of labels that are not -100."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)


class Block(GradientCheckpointingLayer):
    """Attention, then a gated feed-forward layer, each normed before and added to the residual stream."""

    def __init__(self, config: RaytxDecoderConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), **kwargs)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Attention(nn.Module):
    """Causal attention whose query heads share keys and values in groups (Ainslie et al. 2023)."""

    is_causal = True  # read by transformers' attention functions, as are num_key_value_groups and layer_idx

    def __init__(self, config: RaytxDecoderConfig, index: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, index, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.o_proj.adds_to_residual = True

    def forward(
        self,
        hidden: Tensor,
        *,
        rotation: Rotation,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        query, key, value = (self._heads(projection(hidden)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        query, key = rotate(query, rotation), rotate(key, rotation)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed, _ = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.head_dim**-0.5, **kwargs)
        return self.o_proj(mixed.flatten(2))

    def _heads(self, projected: Tensor) -> Tensor:
        """(batch, length, heads * head_dim) to (batch, heads, length, head_dim)."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class SwiGLU(nn.Module):
    """Feed-forward layer gated by SiLU (Shazeer 2020)."""

    def __init__(self, config: RaytxDecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down_proj.adds_to_residual = True

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019), computed in fp32 whatever comes in."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(hidden.dtype)


def rotary(position_ids: Tensor, *, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Return the rotation of each position (Su et al. 2021). Computed anew each pass: there is no buffer to keep."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids[..., None].float() * theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) by its position's angle."""
    cos, sin = rotation
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def eager_attention(
    module: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Attention in plain torch, for `attn_implementation="eager"`; returns (batch, length, heads, head_dim)."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores if mask is None else scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


def register() -> None:
    """Make the Auto classes know the architecture. May be called any number of times."""
    AutoConfig.register(RaytxDecoderConfig.model_type, RaytxDecoderConfig, exist_ok=True)
    AutoModel.register(RaytxDecoderConfig, RaytxDecoderModel, exist_ok=True)
    AutoModelForCausalLM.register(RaytxDecoderConfig, RaytxDecoderForCausalLM, exist_ok=True)
