"""Every installed component keeps its kind's protocol, ours and strangers' alike."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from raytx.components import KINDS, Component
from raytx.registry import registry
from raytx.testing import check_component, check_compression, check_export, check_model, tiny_model, tiny_rows

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
}
BERT = LLAMA | {"model_type": "bert", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
del BERT["num_key_value_heads"]
CAUSAL: dict[str, Any] = {"type": "hf", "task": "causal-lm", "config": LLAMA, "tokenizer": {"train": "bpe"}}
CLASSIFIER: dict[str, Any] = {
    "type": "hf",
    "task": "sequence-classification",
    "config": BERT,
    "tokenizer": {"train": "wordpiece"},
}

FIELDS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("model", "decoder"): [tiny_model(), tiny_model() | {"packing": False}],
    ("model", "hf"): [CAUSAL, CAUSAL | {"packing": False}, CLASSIFIER, CAUSAL | {"adapter": {"r": 4}}],
    ("data", "text-files"): [{"path": "{texts}", "split": {"test": 0.2}}],
    ("data", "files"): [{"path": "{table}", "split": {"test": 0.2}}],
    ("data", "datasets"): [{"name": "{tables}", "split": {"test": 0.2}}],
    ("strategy", "deepspeed"): [{"stage": stage} for stage in range(4)],
    ("compression", "l1-pruning"): [{"amount": 0.5}, {"amount": 0.5, "scope": "layer"}],
    ("export", "onnx"): [{}, {"quantize": "dynamic"}],
}
"""What a component is checked with, where its defaults are too large or not enough; a case for each entry."""

CASES = [
    pytest.param(kind, type_, fields, id=f"{kind}-{type_}-{place}")
    for kind in KINDS
    for type_ in registry().components[kind]
    for place, fields in enumerate(FIELDS.get((kind, type_), [{}]))
]


def component(kind: str, type_: str, fields: dict[str, Any]) -> Component:
    return registry().parse(kind, {"type": type_, **fields})


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write the rows as texts and as a table; return where."""
    root: Path = tmp_path_factory.mktemp("rows")
    for name in ("texts", "tables"):
        (root / name).mkdir()
    for number, row in enumerate(tiny_rows()):
        (root / "texts" / f"{number:03}.txt").write_text(row["text"])
    with open(root / "tables" / "train.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(tiny_rows())
    return {"texts": str(root / "texts"), "tables": str(root / "tables"), "table": str(root / "tables" / "train.csv")}


@pytest.mark.parametrize(("kind", "type_", "fields"), CASES)
def test_a_component_keeps_its_protocol(kind: str, type_: str, fields: dict[str, Any], places: dict[str, str]) -> None:
    filled = {key: value.format(**places) if isinstance(value, str) else value for key, value in fields.items()}
    check_component(component(kind, type_, filled))


def test_every_case_is_of_an_installed_component() -> None:
    assert {(kind, type_) for kind, type_ in FIELDS} <= {(k, t) for k in KINDS for t in registry().components[k]}


@pytest.mark.parametrize("type_", registry().components["compression"])
def test_every_compression_works_on_a_classifier_too(type_: str) -> None:
    check_compression(component("compression", type_, {}), model=component("model", "hf", CLASSIFIER))


@pytest.mark.parametrize("type_", registry().components["export"])
def test_every_export_works_on_a_classifier_too(type_: str) -> None:
    check_export(component("export", type_, {}), model=component("model", "hf", CLASSIFIER))


@pytest.mark.parametrize("compression", registry().components["compression"])
def test_the_hf_export_holds_every_compressed_form(compression: str) -> None:
    check_export(component("export", "hf", {}), compression=[component("compression", compression, {})])


def test_a_model_with_dropout_is_deterministic_when_it_is_only_asked() -> None:
    dropping = BERT | {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    model = component("model", "hf", CLASSIFIER | {"config": dropping})
    check_model(model)
