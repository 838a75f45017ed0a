"""Rows become features once; what was left out is counted and said."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from raytx.errors import DataError
from raytx.plan import resolve
from raytx.prepare import prepare

MODEL = {
    "type": "hf",
    "task": "sequence-classification",
    "config": {
        "model_type": "bert",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 120,
        "max_position_embeddings": 32,
    },
    "tokenizer": {"train": "wordpiece", "vocab_size": 120},
}


@pytest.fixture
def table(tmp_path, recipe):
    """Write rows as JSON lines and return a plan over them."""

    def make(rows, **values):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"type": "files", "path": str(path), **values}
        return resolve(recipe("table", model=MODEL, data=data, storage_path=str(tmp_path / "runs")))

    return make


def prepared(plan):
    return prepare(plan, Console(quiet=True))


GOOD = [{"text": f"word{n % 5} and more", "label": n % 2} for n in range(20)]


def test_rows_that_cannot_be_used_are_counted_with_their_reason_and_place(table):
    plan = table([*GOOD, {"text": "", "label": 1}, {"text": "no label", "label": None}, {"text": None, "label": 0}])
    _, found = prepared(plan)
    assert found.num_samples["train"] == 20
    assert "3 rows of the train split left out (2 x empty text, 1 x no label): rows 20, 21, 22" in found.remarks


def test_a_second_preparation_finds_the_first(table, tmp_path):
    _, first = prepared(table(GOOD))
    stamp = (first.directory / "train.arrow").stat().st_mtime_ns
    _, second = prepared(table(GOOD))
    assert second.directory == first.directory
    assert (second.directory / "train.arrow").stat().st_mtime_ns == stamp
    _, other = prepared(table([*GOOD, {"text": "one more", "label": 1}]))
    assert other.directory != first.directory
    assert not list((tmp_path / "runs" / ".cache").glob(".*"))


def test_a_failed_preparation_leaves_nothing(table, tmp_path):
    with pytest.raises(DataError):
        prepared(table([{"text": "only", "label": 1}] * 5))
    assert not list((tmp_path / "runs" / ".cache").iterdir())


def test_a_label_only_the_held_out_split_has_is_reported(table, tmp_path):
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"text": "strange", "label": "new"}) + "\n" + json.dumps(GOOD[0]) + "\n")
    _, found = prepared(table(GOOD, test_path=str(test)))
    assert found.num_samples["test"] == 1
    assert "label 'new' is not among the training labels" in found.remarks[0]


def test_steps_follow_from_epochs_and_samples(table):
    plan = table(GOOD)
    recipe = plan.recipe.override({"train.steps": None, "train.epochs": 3})
    plan, _ = prepared(resolve(recipe))
    assert (plan.steps_per_epoch, plan.steps) == (3, 9)  # 20 samples in batches of 8


def test_the_baseline_is_what_frequencies_alone_would_score(table):
    rows = [{"text": "a b", "label": "x"}] * 15 + [{"text": "c d", "label": "y"}] * 5
    _, found = prepared(table(rows))
    assert found.baseline["accuracy"] == pytest.approx(0.75)
    assert found.baseline["loss"] == pytest.approx(0.5623, abs=1e-4)
