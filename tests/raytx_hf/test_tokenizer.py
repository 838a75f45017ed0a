"""Tokenizers trained on the rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raytx.errors import DataError, RecipeError
from raytx.registry import registry


def _task(tiny: Any, component: dict[str, Any], directory: Path, **more: Any) -> Any:
    return tiny.prepared(component, directory, **more).task(directory)


def test_byte_level_bpe_spells_any_text_back(tiny: Any, tmp_path: Path) -> None:
    tokenizer = _task(tiny, tiny.causal["llama"], tmp_path).tokenizer
    for text in (*tiny.texts, "naïve 你好 \t  🙂\n", " leading"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer) <= 320


TRAIN = """
import argparse, sys
from pathlib import Path
from transformers import BertConfig
from raytx_hf import tokenizer
from raytx_hf.model import TrainedTokenizer

lines = (Path(argparse.__file__).read_text() + "na\u00efve \u9152\u5e97\u5f88\u597d").split("\\n")
for algorithm in ("bpe", "wordpiece"):
    for size in (300, 600):
        for task in ("causal-lm", "sequence-classification"):
            asked = TrainedTokenizer(train=algorithm, vocab_size=size)
            trained = tokenizer._train(asked, lambda: iter(lines), BertConfig(), task=task)
            print(trained.backend_tokenizer.to_str())
"""


def test_the_same_texts_train_the_same_tokenizers_in_every_process() -> None:
    """Many merges are equally frequent in this text; a vocabulary cut off among them shows who decides."""
    runs = [subprocess.run([sys.executable, "-c", TRAIN], check=True, capture_output=True) for _ in range(2)]
    written = [run.stdout.splitlines() for run in runs]
    assert len(written[0]) == 8
    assert written[0] == written[1]


def test_wordpiece_learns_pieces_that_are_words_like_any_other(tiny: Any, tmp_path: Path) -> None:
    tokenizer = _task(tiny, tiny.classifier, tmp_path, rows=tiny.labelled_rows).tokenizer
    assert len(tokenizer) <= 200
    assert tokenizer.tokenize("The foxes ##s")[:1] == ["the"]
    assert tokenizer.tokenize("foxes ##s") == [*tokenizer.tokenize("foxes"), "[UNK]", "[UNK]", "s"]
    assert set(tokenizer.get_added_vocab()) == {"[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"}
    assert tokenizer.decode(tokenizer.encode("the lazy dog"), skip_special_tokens=True) == "the lazy dog"


def test_a_classifiers_tokenizer_frames_texts_and_pairs(tiny: Any, tmp_path: Path) -> None:
    tokenizer = _task(tiny, tiny.classifier, tmp_path, rows=tiny.labelled_rows).tokenizer
    encoded = tokenizer("the dog", "the fox")
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert (tokens[0], tokens[-1], tokens.count("[SEP]")) == ("[CLS]", "[SEP]", 2)
    assert sorted(set(encoded["token_type_ids"])) == [0, 1]


def test_chinese_is_read_character_by_character(tiny: Any, tmp_path: Path) -> None:
    rows = [{"text": "酒店很好", "label": "1"}, {"text": "房间不好", "label": "0"}]
    tokenizer = _task(tiny, tiny.classifier, tmp_path, rows=lambda: iter(rows)).tokenizer
    assert tokenizer.tokenize("很不好") == ["很", "不", "好"]


def test_a_vocabulary_too_small_for_the_bytes_is_refused(tiny: Any, tmp_path: Path) -> None:
    component = {**tiny.causal["llama"], "tokenizer": {"train": "bpe", "vocab_size": 100}}
    with pytest.raises(RecipeError, match="needs at least 257"):
        tiny.prepared(component, tmp_path)


def test_rows_without_text_are_an_error(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row has text"):
        tiny.prepared(tiny.causal["llama"], tmp_path, rows=lambda: iter([{"text": ""}, {"text": None}]))


def test_a_directory_without_a_tokenizer_is_refused(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    component = {**tiny.causal["llama"], "tokenizer": str(tmp_path / "empty")}
    with pytest.raises(RecipeError, match="no tokenizer at"):
        tiny.prepared(component, tmp_path / "processor")


def test_a_tokenizer_is_taken_from_a_directory(tiny: Any, tmp_path: Path) -> None:
    first = _task(tiny, tiny.causal["llama"], tmp_path / "first")
    component = {**tiny.causal["gpt2"], "tokenizer": str(tmp_path / "first")}
    assert list(registry().parse("model", component).local_files()) == [("tokenizer", str(tmp_path / "first"))]
    again = _task(tiny, component, tmp_path / "again")
    assert again.tokenizer.encode("the fox") == first.tokenizer.encode("the fox")


def test_a_family_without_token_types_gets_none(tiny: Any, tmp_path: Path) -> None:
    component = {**tiny.classifier, "config": tiny.llama}
    tokenizer = _task(tiny, component, tmp_path, rows=tiny.labelled_rows).tokenizer
    assert set(tokenizer("the dog", "the fox")) == {"input_ids", "attention_mask"}
