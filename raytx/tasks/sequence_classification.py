"""Sequence classification: one label for a text or a pair of texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from raytx.errors import DataError
from raytx.tasks.base import Features, Request, Response, Row, Runner, Task, cross_entropy

MAX_LABELS = 1000
"""More distinct labels than this is taken for a column that holds no classes."""


class SequenceClassification(Task):
    """Give each text, or pair of texts, one of a set of labels learned from the data."""

    name = "sequence-classification"
    protocol = "open-inference"
    metrics_mode: ClassVar[dict[str, Literal["min", "max"]]] = {"accuracy": "max", "f1": "max", "loss": "min"}
    needs_logits = True
    required_columns = ("text", "label")

    def __init__(self, tokenizer: Any, *, max_length: int, labels: Sequence[str]) -> None:
        super().__init__(tokenizer, max_length=max_length)
        self.labels = list(labels)
        self._ids = {label: index for index, label in enumerate(self.labels)}

    @classmethod
    def fit(cls, rows: Callable[[], Iterator[Row]]) -> dict[str, Any]:
        labels = {_name(row["label"]) for row in rows() if _text(row.get("text")) and row.get("label") is not None}
        if len(labels) < 2:
            raise DataError(f"the 'label' column holds {len(labels)} distinct values; classification needs two or more")
        if len(labels) > MAX_LABELS:
            raise DataError(f"the 'label' column holds {len(labels)} distinct values, {MAX_LABELS} at most are classes")
        return {"labels": sorted(labels, key=_natural)}

    def state(self) -> dict[str, Any]:
        return super().state() | {"labels": self.labels}

    # ---- training

    def features(self, rows: Iterable[Row], rejected: Callable[[int, str], None]) -> Iterator[Features]:
        for index, row in enumerate(rows):
            if not _text(row.get("text")):
                rejected(index, "empty text")
            elif row.get("label") is None:
                rejected(index, "no label")
            elif _name(row["label"]) not in self._ids:
                rejected(index, f"label {_name(row['label'])!r} is not among the training labels")
            else:
                yield self._encode(row) | {"labels": self._ids[_name(row["label"])], "num_targets": 1}

    def _encode(self, row: Row) -> Features:
        encoded = self.tokenizer(row["text"], row.get("text_pair"), truncation=True, max_length=self.max_length)
        return {key: list(value) for key, value in encoded.items()}

    def collate(self, samples: Sequence[Features]) -> Features:
        plain = [{k: v for k, v in sample.items() if k not in {"labels", "num_targets"}} for sample in samples]
        batch = {key: np.asarray(value, dtype=np.int64) for key, value in self._pad(plain).items()}
        if "labels" in samples[0]:
            batch["labels"] = np.asarray([sample["labels"] for sample in samples], dtype=np.int64)
        return batch

    def _pad(self, samples: list[Features]) -> dict[str, Any]:
        return dict(self.tokenizer.pad(samples, return_tensors="np"))

    def loss(self, batch: Features, logits: np.ndarray) -> float:
        return cross_entropy(logits, batch["labels"])

    def evaluation(self, batch: Features, loss: float, logits: np.ndarray | None, num_targets: int) -> Features:
        assert logits is not None
        return {
            "loss_sum": np.full(len(logits), loss),
            "predictions": logits.argmax(-1),
            "labels": batch["labels"],
        }

    def metrics(self, parts: Sequence[Features]) -> dict[str, float]:
        """Accuracy, F1 (the plain mean over labels, "macro") and the mean cross entropy."""
        from sklearn.metrics import accuracy_score, f1_score

        labels, predictions, losses = (
            np.concatenate([part[key] for part in parts]) for key in ("labels", "predictions", "loss_sum")
        )
        return {
            "loss": float(losses.mean()),
            "accuracy": float(accuracy_score(labels, predictions)),
            "f1": float(
                f1_score(labels, predictions, average="macro", labels=range(len(self.labels)), zero_division=0)
            ),
        }

    def baseline(self, samples: Iterable[Features]) -> tuple[str, dict[str, float]]:
        counts = np.array(list(Counter(sample["labels"] for sample in samples).values()), dtype=np.float64)
        share = counts / counts.sum()
        return "always the commonest label", {
            "accuracy": float(share.max()),
            "loss": float(-(share * np.log(share)).sum()),
        }

    def golden(self, samples: Sequence[Features]) -> Features:
        return {key: value for key, value in self.collate(samples).items() if key != "labels"}

    # ---- serving

    def demo(self, samples: Sequence[Features]) -> list[tuple[Request, str]]:
        texts = [self.tokenizer.decode(sample["input_ids"], skip_special_tokens=True) for sample in samples]
        return [({"text": text}, text if len(text) <= 160 else f"{text[:159]}…") for text in texts]

    def show(self, response: Response) -> str:
        return f"{response['label']} ({max(response['probabilities']):.0%})"

    def predict(self, runner: Runner, requests: Sequence[Request]) -> list[Response]:
        """Classify texts. A request has "text" and optionally "text_pair"; a response label and probabilities."""
        logits = runner.logits(self.collate([self._encode(request) for request in requests])).astype(np.float64)
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        return [{"label": self.labels[int(row.argmax())], "probabilities": row.tolist()} for row in shares]

    def label_names(self) -> list[str]:
        return self.labels


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _name(label: Any) -> str:
    """A label's name: 1.0 read from a column with gaps is the same class as 1."""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _natural(label: str) -> tuple[int, float, str]:
    """Sort "2" before "10"."""
    return (0, float(label), label) if re.fullmatch(r"-?\d+", label) else (1, 0.0, label)
