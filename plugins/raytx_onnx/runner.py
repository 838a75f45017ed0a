"""Run an exported graph with ONNX Runtime: logits of a batch, and text token by token."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from raytx.files import read_json
from raytx.tasks.base import Features

MODEL = "model.onnx"
REPORT = "onnx_export.json"

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Past:
    """A with-past graph's cache: keys and values of each layer, and which of their places hold tokens."""

    arrays: list[np.ndarray]
    mask: np.ndarray
    """(batch, total) of 0 and 1."""


class OnnxRunner:
    """The forward pass of an ONNX directory. Holds no state between calls."""

    def __init__(self, directory: Path) -> None:
        self.session = onnxruntime.InferenceSession(
            str(directory / MODEL), _options(), providers=["CPUExecutionProvider"]
        )
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.past = [value for name, value in self.inputs.items() if name.startswith("past_key_values.")]
        report = directory / REPORT
        self.context_length: int | None = read_json(report).get("context_length") if report.is_file() else None

    def logits(self, features: Features) -> np.ndarray:
        """Return float32 logits of a batch; features that the graph does not take (labels) are left out."""
        if "attention_mask" not in features and _is_packed(features):
            return self._packed(features)
        batch, length = features["input_ids"].shape
        given: Features = {
            "attention_mask": np.ones((batch, length), dtype=np.int64),
            "position_ids": np.broadcast_to(np.arange(length), (batch, length)),
        }
        return self._run(given | features, self._empty(batch))[0]

    def prefill(self, prompts: Prompts) -> tuple[Any, np.ndarray]:
        if not self.past:
            return self._reread([list(prompt) for prompt in prompts])
        width = max(len(prompt) for prompt in prompts)
        ids, mask = np.zeros((2, len(prompts), width), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            # On the left, so that every sequence grows at the same end of the cache.
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
        return self._append(Past(self._empty(len(prompts)), mask[:, :0]), ids, mask)

    def step(self, cache: Any, tokens: np.ndarray) -> tuple[Any, np.ndarray]:
        if not self.past:
            return self._reread([[*row, int(token)] for row, token in zip(cache, tokens, strict=True)])
        return self._append(cache, tokens[:, None], np.ones((len(tokens), 1), dtype=np.int64))

    def _append(self, past: Past, ids: np.ndarray, mask: np.ndarray) -> tuple[Past, np.ndarray]:
        """Feed tokens after those in the cache; return the grown cache and the logits of the last place."""
        mask = np.concatenate([past.mask, mask], axis=1)
        positions = self._within_context(mask.cumsum(axis=1) - 1)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits, *arrays = self._run(given, past.arrays)
        return Past(arrays, mask), logits[:, -1]

    def _within_context(self, positions: np.ndarray) -> np.ndarray:
        """A sequence that ended may ride along past the context while its batch goes on; nobody reads what it says."""
        return positions.clip(0, self.context_length - 1 if self.context_length else None)

    def _reread(self, rows: list[list[int]]) -> tuple[list[list[int]], np.ndarray]:
        """Read whole sequences again for one more token: a graph without a cache costs O(n^2) passes' worth of tokens.

        The cache is the tokens themselves. Padding stands on the right, where causal attention does not see it.
        """
        seen = [row[-self.context_length :] if self.context_length else row for row in rows]
        features = _padded(seen)
        lengths = np.array([len(row) for row in seen])
        return rows, self.logits(features)[np.arange(len(rows)), lengths - 1]

    def _packed(self, features: Features) -> np.ndarray:
        """Return logits of packed rows: each document in a row is read as a sequence of its own, as it was trained."""
        ids, positions = features["input_ids"], features["position_ids"]
        spans = [span for row in range(len(ids)) for span in _documents(row, positions[row])]
        batch = _padded([ids[row, start:end].tolist() for row, start, end in spans])
        answers = self.logits(batch)
        logits = np.empty((*ids.shape, answers.shape[-1]), dtype=np.float32)
        for answer, (row, start, end) in zip(answers, spans, strict=True):
            logits[row, start:end] = answer[: end - start]
        return logits

    def _empty(self, batch: int) -> list[np.ndarray]:
        return [np.zeros((batch, value.shape[1], 0, value.shape[3]), dtype=np.float32) for value in self.past]

    def _run(self, given: Features, past: list[np.ndarray]) -> list[np.ndarray]:
        feed = {name: np.ascontiguousarray(given[name], dtype=np.int64) for name in self.inputs if name in given}
        feed |= {value.name: array for value, array in zip(self.past, past, strict=True)}
        return list(self.session.run(None, feed))


def _options() -> onnxruntime.SessionOptions:
    """Threads as the process was told (OMP_NUM_THREADS); ONNX Runtime would size its pool from the whole machine."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
    options.log_severity_level = 3
    return options


def _is_packed(features: Features) -> bool:
    """Whether a row holds more than one document: some position after the first is 0."""
    return "position_ids" in features and bool((features["position_ids"][:, 1:] == 0).any())


def _documents(row: int, positions: np.ndarray) -> list[tuple[int, int, int]]:
    """Return (row, start, end) of each document in a packed row; positions restart at 0 where one begins."""
    starts = [0, *(np.flatnonzero(positions[1:] == 0) + 1).tolist()]
    return [(row, start, end) for start, end in zip(starts, [*starts[1:], len(positions)], strict=True)]


def _padded(rows: Sequence[Sequence[int]]) -> Features:
    """Pad rows on the right; which token pads does not matter under the mask."""
    width = max(len(row) for row in rows)
    ids, mask = np.zeros((2, len(rows), width), dtype=np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask}
