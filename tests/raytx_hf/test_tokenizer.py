"""Tokenizers trained on the rows."""

from __future__ import annotations

import argparse
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
import sys
from pathlib import Path
from raytx.registry import registry

config = {"model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
          "num_attention_heads": 4, "vocab_size": 1000, "is_decoder": sys.argv[1] == "causal-lm"}
fields = {"task": sys.argv[1], "config": config, "tokenizer": {"train": sys.argv[2], "vocab_size": int(sys.argv[3])}}
lines = Path(sys.argv[4]).read_text().split("\\n")
rows = lambda: ({"text": line, "label": str(n % 2)} for n, line in enumerate(lines))
model = registry().parse("model", {"type": "hf", "packing": False, **fields}).build()
model.fit(rows, Path(sys.argv[5]), max_length=32)
"""


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
@pytest.mark.parametrize(("algorithm", "size"), [("bpe", 600), ("wordpiece", 173), ("wordpiece", 600)])
def test_the_same_rows_train_the_same_tokenizer_in_every_process(
    task: str, algorithm: str, size: int, tmp_path: Path
) -> None:
    """Many merges are equally frequent in this text; a vocabulary cut off among them shows who decides."""
    (tmp_path / "text").write_text(Path(argparse.__file__).read_text() + "naïve 酒店很好\n")
    written = set()
    for name in ("one", "other", "third"):
        (tmp_path / name).mkdir()
        given = [task, algorithm, str(size), str(tmp_path / "text"), str(tmp_path / name)]
        subprocess.run([sys.executable, "-c", TRAIN, *given], check=True)
        written.add(b"".join(path.read_bytes() for path in sorted((tmp_path / name).iterdir())))
    assert len(written) == 1


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
