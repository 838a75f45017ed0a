"""Sequence classification: labels in natural order, rows accounted for, metrics that scikit-learn confirms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from raytx.errors import DataError
from raytx.tasks import SequenceClassification
from raytx.testing import FakeTokenizer


def task(labels: Sequence[str] = ("bad", "good"), max_length: int = 16) -> SequenceClassification:
    return SequenceClassification(FakeTokenizer(), max_length=max_length, labels=labels)


def fitted(values: Sequence[Any]) -> list[str]:
    rows = [{"text": "words", "label": value} for value in values]
    labels: list[str] = SequenceClassification.fit(lambda: iter(rows))["labels"]
    return labels


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["10", "2", "1"], ["1", "2", "10"]),
        ([3, 1.0, 2], ["1", "2", "3"]),
        ([1.0, 1, "1", 2], ["1", "2"]),
        (["-1", "1", "0"], ["-1", "0", "1"]),
        (["b", "a", "10", "9"], ["9", "10", "a", "b"]),
        (["²", "--5", "5"], ["5", "--5", "²"]),
        ([True, False], ["False", "True"]),
        ([0.5, 1.5], ["0.5", "1.5"]),
    ],
    ids=str,
)
def test_labels_are_learned_in_natural_order(values: list[Any], labels: list[str]) -> None:
    assert fitted(values) == labels


def test_labels_of_rows_without_text_do_not_count() -> None:
    rows = [
        {"text": "a", "label": "x"},
        {"text": "b", "label": "y"},
        {"text": " ", "label": "z"},
        {"text": "c", "label": None},
    ]
    assert SequenceClassification.fit(lambda: iter(rows))["labels"] == ["x", "y"]


@pytest.mark.parametrize(("values", "told"), [(["a"] * 9, "holds 1 distinct"), (range(1001), "holds 1001 distinct")])
def test_a_column_that_holds_no_classes_is_refused(values: Sequence[Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        fitted(values)


def test_rows_that_cannot_be_used_are_reported_with_the_reason() -> None:
    rejected: dict[int, str] = {}
    rows = [
        {"text": "fine", "label": "good"},
        {"text": "", "label": "good"},
        {"text": "fine", "label": None},
        {"text": "fine", "label": "new"},
        {"text": None, "label": "bad"},
    ]
    samples = list(task().features(rows, lambda index, reason: rejected.__setitem__(index, reason)))
    assert [sample["labels"] for sample in samples] == [1]
    assert rejected == {
        1: "empty text",
        2: "no label",
        3: "label 'new' is not among the training labels",
        4: "empty text",
    }


def test_texts_are_cut_to_the_length_and_padded_to_the_longest() -> None:
    samples = list(
        task(max_length=6).features([{"text": "a", "label": "bad"}, {"text": "b" * 50, "label": "good"}], print)
    )
    batch = task().collate(samples)
    assert batch["input_ids"].shape == (2, 6)
    assert batch["attention_mask"].sum(1).tolist() == [2, 6]
    assert batch["labels"].tolist() == [0, 1]
    assert all(value.dtype == np.int64 for value in batch.values())


@pytest.mark.parametrize("classes", [2, 5])
def test_metrics_over_uneven_batches_are_those_of_scikit_learn_over_the_whole(classes: int) -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(97, classes)).astype(np.float32)
    labels = generator.integers(0, classes - 1, size=97)  # one class never occurs
    made = task([str(n) for n in range(classes)])
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    parts = []
    for window in np.split(np.arange(97), [10, 11, 60]):
        loss = -np.log(shares[window, labels[window]]).mean()
        parts.append(made.evaluation({"labels": labels[window]}, float(loss), logits[window], len(window)))
    found = made.metrics(parts)
    predictions, everything = logits.argmax(-1), list(range(classes))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, predictions))
    assert found["f1"] == pytest.approx(
        sk.f1_score(labels, predictions, average="macro", labels=everything, zero_division=0)
    )
    assert found["loss"] == pytest.approx(sk.log_loss(labels, shares, labels=everything), rel=1e-5)


def test_the_baseline_is_the_commonest_label() -> None:
    _, values = task().baseline([{"labels": n} for n in (0, 1, 1, 1)])
    assert values["accuracy"] == 0.75
    assert values["loss"] == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))


class Fixed:
    """A runner with given logits."""

    def __init__(self, logits: list[list[float]]) -> None:
        self.answer = np.array(logits, dtype=np.float32)

    def logits(self, features: dict[str, Any]) -> np.ndarray:
        assert len(features["input_ids"]) == len(self.answer)
        assert "labels" not in features
        return self.answer

    def prefill(self, prompts: Any) -> Any:
        raise NotImplementedError

    step = prefill


def test_a_response_has_the_label_and_probabilities_that_add_up() -> None:
    answers = task().predict(
        Fixed([[0.0, 1000.0], [np.log(3.0), 0.0]]), [{"text": "a"}, {"text": "b", "text_pair": "c"}]
    )
    assert [answer["label"] for answer in answers] == ["good", "bad"]
    assert answers[0]["probabilities"] == pytest.approx([0, 1])
    assert answers[1]["probabilities"] == pytest.approx([0.75, 0.25])


def test_streaming_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="does not stream"):
        task().stream(Fixed([]), {"text": "a"})
