"""Sequence parallelism (Ulysses, Jacobs et al. 2023): each rank has a slice of every sample, and attention sees it all.

Around attention, ranks exchange slices of the sequence for shares of the heads. DeepSpeed's attention drops masks, so
that packed documents would see each other and windows would be forgotten; the mask is made here, for whole samples.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from raytx.errors import TrainingError
from raytx_deepspeed.groups import Groups

NAME = "raytx-ulysses"
"""What transformers' registry of attention functions knows it by; for a name of its own it makes no mask."""
Tensors = dict[str, torch.Tensor]


class Slices:
    """One rank's slice of the samples of a sequence-parallel group, and the attention that joins them."""

    def __init__(self, module: nn.Module, groups: Groups) -> None:
        self._groups, self._config = groups, module.config.get_text_config()
        self._size, self._place = groups.layout.sequence_parallel_size, groups.coordinate.sequence
        self._exchanges: dict[int, UlyssesSPAttentionHF] = {}
        self._sample = Sample.none()
        self._used = False
        self._config._attn_implementation = NAME
        ALL_ATTENTION_FUNCTIONS.register(NAME, self._attention)

    def mine(self, features: Tensors) -> Tensors:
        """Return this rank's slice of a batch's features, (batch, length / ranks), for a causal language model.

        Labels are shifted before they are cut, and the loss is divided by the targets of whole samples: the losses of
        all ranks add up to the mean loss of the batch.
        """
        batch = self._padded(features)
        self._sample = Sample(batch["position_ids"], batch.get("attention_mask"), packed="position_ids" in features)
        batch.pop("attention_mask", None)
        if "labels" not in batch:
            return {key: self._slice(value) for key, value in batch.items()}
        batch["shift_labels"] = functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        targets = (batch["shift_labels"] != -100).sum()
        return {**{key: self._slice(value) for key, value in batch.items()}, "num_items_in_batch": targets}

    def whole(self, logits: torch.Tensor, *, length: int) -> torch.Tensor:
        """Return the logits of whole samples, (batch, length, vocabulary), from those of every rank's slice."""
        parts = [torch.empty_like(logits) for _ in range(self._size)]
        dist.all_gather(parts, logits.contiguous(), group=self._groups.sequence)
        return torch.cat(parts, dim=1)[:, :length]

    def check(self) -> None:
        """Raise TrainingError where a model computed without the attention that joins the slices."""
        if not self._used:
            raise TrainingError(
                "sequence_parallel_size: this model does not call transformers' attention functions, so its slices "
                "would not see each other; use sequence_parallel_size=1"
            )

    # ---- slices

    def _padded(self, features: Tensors) -> Tensors:
        """Return features with positions, and padding at the end up to a length that the ranks divide."""
        ids = features["input_ids"]
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        extra = -ids.shape[1] % self._size
        return {
            key: functional.pad(value, (0, extra), value=-100 if key == "labels" else 0)
            for key, value in {"position_ids": positions, **features}.items()
        }

    def _slice(self, value: torch.Tensor) -> torch.Tensor:
        return value.chunk(self._size, dim=1)[self._place].contiguous()

    # ---- attention

    def _attention(self, module: nn.Module, *tensors: Any, **options: Any) -> tuple[torch.Tensor, None]:
        """Return (batch, length / ranks, heads, width) for queries, keys and values of (batch, heads, length / ranks,
        width), as every layer calls it."""
        self._used = True
        query, key, value, _ = tensors
        options["position_ids"] = self._slice(self._sample.positions)
        output, _ = self._exchange(query.shape[0])(module, query, key, value, None, **options)
        return output.unflatten(-1, (query.shape[1], -1)), None

    def _exchange(self, batch: int) -> UlyssesSPAttentionHF:
        """Return DeepSpeed's attention, which is made for one batch size."""
        if batch not in self._exchanges:
            heads, cut = self._config.num_attention_heads, self._groups.layout.tensor_parallel_size
            self._exchanges[batch] = UlyssesSPAttentionHF(
                attn=self._attend,
                batch_size=batch,
                attn_head_count=heads // cut,
                attn_head_size=getattr(self._config, "head_dim", None) or self._config.hidden_size // heads,
                kv_head_count=(getattr(self._config, "num_key_value_heads", None) or heads) // cut,
                num_hidden_layers=self._config.num_hidden_layers,
                process_group=self._groups.sequence,
                seq_length_is_variable=True,
            )
        return self._exchanges[batch]

    def _attend(self, module: nn.Module, *tensors: Any, **options: Any) -> tuple[torch.Tensor, None]:
        """Attend over whole sequences with this rank's share of the heads."""
        query, key, value, _ = tensors
        mask = self._sample.mask(options.get("sliding_window"))
        return sdpa_attention_forward(module, query, key, value, mask, **options)


class Sample:
    """What tokens of a batch of whole samples may see."""

    def __init__(self, positions: torch.Tensor, present: torch.Tensor | None, *, packed: bool) -> None:
        """`positions` restart at 0 with every packed document; `present` is 0 for padding, at the end."""
        self.positions, self._present, self._packed = positions, present, packed

    @classmethod
    def none(cls) -> Sample:
        return cls(torch.zeros(0, 0), None, packed=False)

    def mask(self, window: int | None) -> torch.Tensor | None:
        """Return whether a query sees a key, (batch, 1, length, length); None where it sees all before it."""
        length = self.positions.shape[1]
        if window is not None and window < length:
            return self._whole & (self._ago < window)
        return self._whole if self._packed or self._present is not None else None

    @cached_property
    def _ago(self) -> torch.Tensor:
        """How far back a key is, (length, length)."""
        places = torch.arange(self.positions.shape[1], device=self.positions.device)
        return places[:, None] - places

    @cached_property
    def _whole(self) -> torch.Tensor:
        seen = (self._ago >= 0)[None, None]
        if self._packed:
            documents = functional.pad(self.positions.diff(dim=1) != 1, (1, 0)).cumsum(dim=1)
            seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
        if self._present is not None:
            seen = seen & self._present.bool()[:, None, None, :]
        return seen
