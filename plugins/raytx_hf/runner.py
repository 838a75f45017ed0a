"""The forward pass of a live transformers module, numpy in and out, with its own key-value cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytx.tasks.base import Features

Rows = list[list[int]]
"""The tokens of each sequence: all that is kept between steps of an architecture without a cache."""


@dataclass(frozen=True)
class Cache:
    """What a step needs of those before it."""

    past: Any
    """The transformers cache; a step grows it in place."""
    mask: Tensor
    """(batch, length so far): 0 marks the padding left of short prompts."""


class TorchRunner:
    """Fulfils raytx.tasks.base.Runner on whatever device the module is."""

    def __init__(self, module: Any) -> None:
        self.module = module
        base = module.get_base_model() if hasattr(module, "get_base_model") else module
        self._accepted = inspect.signature(base.forward).parameters
        self._caches = "past_key_values" in self._accepted
        config = base.config.get_text_config()
        self._context_length: int | None = getattr(config, "max_position_embeddings", None)

    def logits(self, features: Features) -> np.ndarray:
        given = {key: self._tensor(value) for key, value in features.items() if key != "labels"}
        with self._inference():
            return _numpy(self.module(**given, **self._known(use_cache=False)).logits)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Cache | Rows, np.ndarray]:
        """Pad prompts on the left, so that every sequence's next token comes in the same column."""
        if not self._caches:
            return self._reread([list(prompt) for prompt in prompts])
        width = max(map(len, prompts))
        ids = np.zeros((len(prompts), width), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        return self._advance(None, self._tensor(ids), self._tensor(mask))

    def step(self, cache: Cache | Rows, tokens: np.ndarray) -> tuple[Cache | Rows, np.ndarray]:
        if isinstance(cache, list):
            return self._reread([[*row, int(token)] for row, token in zip(cache, tokens, strict=True)])
        ids = self._tensor(tokens)[:, None]
        return self._advance(cache.past, ids, torch.cat((cache.mask, torch.ones_like(ids)), dim=1))

    def _advance(self, past: Any, ids: Tensor, mask: Tensor) -> tuple[Cache, np.ndarray]:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        optional = self._known(position_ids=positions, logits_to_keep=1)
        with self._inference():
            output = self.module(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True, **optional)
            return Cache(output.past_key_values, mask), _numpy(output.logits[:, -1])

    def _reread(self, rows: Rows) -> tuple[Rows, np.ndarray]:
        """Read whole sequences again for one more token, where the architecture keeps no cache of its past.

        Padding stands on the right, where causal attention does not see it.
        """
        seen = [row[-self._context_length :] if self._context_length else row for row in rows]
        ends = np.array([len(row) for row in seen])
        ids = np.zeros((len(seen), ends.max()), dtype=np.int64)
        for place, row in enumerate(seen):
            ids[place, : len(row)] = row
        mask = (np.arange(ids.shape[1]) < ends[:, None]).astype(np.int64)
        return rows, self.logits({"input_ids": ids, "attention_mask": mask})[np.arange(len(rows)), ends - 1]

    def _known(self, **options: Any) -> dict[str, Any]:
        """Keep the options that this architecture's forward takes; one without positions counts them in the mask."""
        return {key: value for key, value in options.items() if key in self._accepted}

    def _tensor(self, value: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(value)).to(self._device)

    @property
    def _device(self) -> torch.device:
        tensors = self.module.parameters()
        return next(tensors, torch.empty(0)).device

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Evaluate, and leave the module in the mode it was found in."""
        training = self.module.training
        self.module.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.module.train(training)


def _numpy(logits: Tensor) -> np.ndarray:
    return logits.float().cpu().numpy()
