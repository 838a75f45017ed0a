"""Causal language modelling: packing loses and leaks nothing; answers end where they should, streamed or whole."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytx.errors import ArtifactError
from raytx.tasks import CausalLM, SequenceClassification
from raytx.tasks.base import IGNORED
from raytx.tasks.causal_lm import cut, pack
from raytx.testing import FakeTokenizer, tiny_rows

EOS, PAD = FakeTokenizer.eos_token_id, FakeTokenizer.pad_token_id


def task(**options: Any) -> CausalLM:
    return CausalLM(FakeTokenizer(), **{"max_length": 16} | options)


def features(made: CausalLM, texts: Sequence[Any]) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    rejected: list[tuple[int, str]] = []
    rows = [{"text": text} for text in texts]
    return list(made.features(rows, lambda index, reason: rejected.append((index, reason)))), rejected


def random_documents(seed: int) -> list[list[int]]:
    """Documents of distinct tokens, so that each token tells where it came from."""
    generator = random.Random(seed)
    lengths = [generator.choice([2, 3, 4, 5, 7, 15, 16, 17, 18, 33, 40]) for _ in range(30)]
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    return [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]


# ---- packing


@pytest.mark.parametrize("max_length", [3, 4, 5, 8, 16, 64])
@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_every_token_exactly_once_in_order(seed: int, max_length: int) -> None:
    documents = random_documents(seed)
    bins = list(pack(documents, max_length))
    kept = [token for held in bins for piece in held for token in piece]
    assert kept == [token for document in documents for token in document]
    assert all(1 < sum(map(len, held)) <= max_length for held in bins)
    assert all(len(piece) > 1 for held in bins for piece in held)


@pytest.mark.parametrize("max_length", [4, 8, 16])
@pytest.mark.parametrize("seed", range(5))
def test_packing_leaves_at_most_two_places_empty_but_in_the_last_bin(seed: int, max_length: int) -> None:
    *full, _ = [sum(map(len, held)) for held in pack(random_documents(seed), max_length)]
    assert min(full) >= max_length - 2


def test_no_piece_holds_tokens_of_two_documents() -> None:
    documents = random_documents(0)
    owner = {token: place for place, document in enumerate(documents) for token in document}
    for held in pack(documents, 16):
        assert all(len({owner[token] for token in piece}) == 1 for piece in held)


@pytest.mark.parametrize("length", range(2, 40))
def test_cutting_a_document_loses_no_token_and_leaves_no_single_one(length: int) -> None:
    pieces = list(cut(list(range(length)), 8))
    assert [token for piece in pieces for token in piece] == list(range(length))
    assert all(2 <= len(piece) <= 8 for piece in pieces)


@pytest.mark.parametrize("packing", [True, False])
def test_every_byte_of_every_text_is_trained_on_and_ends_with_end_of_sequence(packing: bool) -> None:
    texts = [row["text"] for row in tiny_rows()]
    samples, rejected = features(task(packing=packing), texts)
    assert rejected == []
    tokens = [token for sample in samples for token in sample["input_ids"]]
    assert tokens == [token for text in texts for token in [*text.encode(), EOS]]


@pytest.mark.parametrize("packing", [True, False])
def test_a_document_starts_without_a_target_and_at_position_zero(packing: bool) -> None:
    samples, _ = features(task(packing=packing), [row["text"][:9] for row in tiny_rows()])
    for sample in samples:
        starts = [place for place, position in enumerate(sample["position_ids"]) if position == 0]
        masked = [place for place, label in enumerate(sample["labels"]) if label == IGNORED]
        assert masked == starts, "a first token as target would be predicted from another document"
        assert sample["num_targets"] == len(sample["labels"]) - len(starts)
        pairs = zip(sample["input_ids"], sample["labels"], strict=True)
        assert all(label in (token, IGNORED) for token, label in pairs)


def test_unpacked_samples_hold_one_document_each() -> None:
    samples, _ = features(task(packing=False), ["abc", "de"])
    assert [sample["input_ids"] for sample in samples] == [[97, 98, 99, EOS], [100, 101, EOS]]


def test_rows_without_text_are_reported_by_index() -> None:
    samples, rejected = features(task(), ["ab", "", None, 7, "cd"])
    assert [index for index, _ in rejected] == [1, 2, 3]
    assert len(samples) == 1


def test_a_packed_batch_marks_documents_and_padding_by_positions_alone() -> None:
    samples, _ = features(task(), ["abc", "defghijklmno", "pq"])
    batch = task().collate(samples)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == sample["input_ids"]
        assert set(batch["input_ids"][row, length:]) <= {PAD}
        assert set(batch["labels"][row, length:]) <= {IGNORED}
        assert set(batch["position_ids"][row, length:]) <= {0}


def test_an_unpacked_batch_masks_its_padding() -> None:
    made = task(packing=False)
    samples, _ = features(made, ["abc", "d"])
    batch = made.collate(samples)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"][1].tolist() == [IGNORED, EOS, IGNORED, IGNORED]


# ---- metrics


def test_the_loss_is_the_mean_over_targets_of_all_batches() -> None:
    made = task()
    parts = [made.evaluation({}, 2.0, None, 30), made.evaluation({}, 5.0, None, 10)]
    metrics = made.metrics(parts)
    assert metrics["loss"] == pytest.approx((2.0 * 30 + 5.0 * 10) / 40)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))


def test_the_baseline_is_the_entropy_of_token_frequencies() -> None:
    name, values = task().baseline([{"input_ids": [1, 1, 2]}, {"input_ids": [3]}])
    assert "unigram" in name
    assert values["loss"] == pytest.approx(-(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)))


# ---- state


def test_a_task_is_rebuilt_from_its_directory(tmp_path: Path) -> None:
    made = task(packing=False, context_length=64)
    made.save(tmp_path)
    again = CausalLM.load(tmp_path, FakeTokenizer())
    assert again.state() == made.state()
    with pytest.raises(ArtifactError, match="'sequence-classification' was expected"):
        SequenceClassification.load(tmp_path, FakeTokenizer())
    with pytest.raises(ArtifactError, match="not a raytx processor"):
        CausalLM.load(tmp_path / "absent", FakeTokenizer())


# ---- completing


class Script:
    """A runner that says given texts, one byte at a time, and then end of sequence."""

    def __init__(self, *texts: str) -> None:
        self.scripts = [[*text.encode(), EOS] for text in texts]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[int, np.ndarray]:
        return 0, self._say(0)

    def step(self, cache: int, tokens: np.ndarray) -> tuple[int, np.ndarray]:
        return cache + 1, self._say(cache + 1)

    def _say(self, place: int) -> np.ndarray:
        return np.stack([np.eye(258)[script[min(place, len(script) - 1)]] for script in self.scripts])

    def logits(self, features: dict[str, Any]) -> np.ndarray:
        raise AssertionError("completing reads prompts by prefill and step")


def whole(text: str, **request: Any) -> dict[str, Any]:
    (answer,) = task(context_length=1000).predict(Script(text), [{"prompt": "x", "max_tokens": 500} | request])
    return answer


def streamed(text: str, **request: Any) -> list[dict[str, Any]]:
    return list(task(context_length=1000).stream(Script(text), {"prompt": "x", "max_tokens": 500} | request))


def test_an_answer_ends_at_end_of_sequence_and_counts_it() -> None:
    answer = whole("hello")
    assert (answer["text"], answer["finish_reason"]) == ("hello", "stop")
    assert (answer["prompt_tokens"], answer["completion_tokens"]) == (1, 6)


def test_an_answer_ends_at_the_token_limit() -> None:
    answer = whole("hello", max_tokens=3)
    assert (answer["text"], answer["finish_reason"], answer["completion_tokens"]) == ("hel", "length", 3)


def test_an_answer_ends_where_the_context_is_full() -> None:
    (answer,) = task(context_length=10).predict(Script("hello"), [{"prompt": "1234567", "max_tokens": 500}])
    assert (answer["text"], answer["finish_reason"]) == ("hel", "length")


def test_requests_of_one_batch_end_each_in_its_own_way() -> None:
    requests = [{"prompt": "a", "max_tokens": 2}, {"prompt": "bc", "max_tokens": 50}, {"prompt": "", "stop": ["l"]}]
    answers = task(context_length=100).predict(Script("hello", "hi", "well"), requests)
    assert [answer["text"] for answer in answers] == ["he", "hi", "we"]
    assert [answer["finish_reason"] for answer in answers] == ["length", "stop", "stop"]
    assert [answer["prompt_tokens"] for answer in answers] == [1, 2, 1], "an empty prompt starts a document"


def test_the_first_stop_word_ends_the_answer_and_is_left_out() -> None:
    assert whole("one two three", stop=["three", " two"])["text"] == "one"
    assert whole("one two three", stop=["four"])["text"] == "one two three"


SAYINGS = ["hello", "", "añb€c😀d", "a\n\nb", "abcabcabd", "STO STOP more", "x" * 60]
STOPS: list[list[str]] = [[], ["\n\n"], ["abd"], ["STOP"], ["😀"], ["zzz", "xx"]]


@pytest.mark.parametrize("text", SAYINGS)
@pytest.mark.parametrize("stop", STOPS, ids=str)
@pytest.mark.parametrize("max_tokens", [1, 2, 5, 9, 500])
def test_the_pieces_of_a_stream_join_to_the_whole_answer(text: str, stop: list[str], max_tokens: int) -> None:
    pieces = streamed(text, stop=stop, max_tokens=max_tokens)
    expected = whole(text, stop=stop, max_tokens=max_tokens)
    assert "".join(piece["text"] for piece in pieces) == expected["text"]
    assert [piece["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1]["finish_reason"] == expected["finish_reason"]
    assert pieces[-1]["completion_tokens"] == expected["completion_tokens"]


def test_a_stream_never_sends_the_beginning_of_a_stop_word_that_completes() -> None:
    sent = ""
    for piece in streamed("to be STOP or not", stop=["STOP"]):
        sent += piece["text"]
        assert "S" not in sent
    assert sent == "to be "


def test_a_stream_sends_the_beginning_of_a_stop_word_that_does_not_complete() -> None:
    assert "".join(piece["text"] for piece in streamed("a STO b", stop=["STOP"])) == "a STO b"


def test_a_stream_never_sends_half_a_character() -> None:
    pieces = [piece["text"] for piece in streamed("añ€😀b")]
    assert [piece for piece in pieces if piece] == ["a", "ñ", "€", "😀", "b"]


def test_a_stream_comes_piece_by_piece() -> None:
    def slow() -> Iterator[dict[str, Any]]:
        yield from task(context_length=1000).stream(Script("ab"), {"prompt": "x", "max_tokens": 9})

    answers = slow()
    assert next(answers)["text"] == "a"
    answers.close()
