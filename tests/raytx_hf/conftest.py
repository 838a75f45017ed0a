"""Tiny models of three families, made from random weights by their own components."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytx.registry import registry

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "def f(x):\n    return x + 1\n",
    "pack my box with five dozen liquor jugs",
    "import os\nimport sys\nprint(os.getcwd())\n",
] * 5

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
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 320}
BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 200,
    "max_position_embeddings": 64,
}
DECODER = {
    "type": "decoder",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
}
CAUSAL: dict[str, dict[str, Any]] = {
    "llama": {"type": "hf", "task": "causal-lm", "config": LLAMA, "tokenizer": {"train": "bpe"}},
    "gpt2": {"type": "hf", "task": "causal-lm", "config": GPT2, "tokenizer": {"train": "bpe"}},
    "decoder": DECODER,
}


def text_rows() -> Iterator[dict[str, Any]]:
    return ({"text": text} for text in TEXTS)


def labelled_rows() -> Iterator[dict[str, Any]]:
    return ({"text": text, "label": "code" if "\n" in text else "prose"} for text in TEXTS)


def prepared(component: dict[str, Any], directory: Path, *, rows: Any = text_rows, max_length: int = 48) -> Any:
    """Return the built model of a component, with its processor fitted into the directory."""
    model = registry().parse("model", component).build()
    directory.mkdir(exist_ok=True)
    model.fit(rows, directory, max_length=max_length)
    return model


@pytest.fixture
def tiny() -> SimpleNamespace:
    """Components, rows and `prepared`, for tests that make models of their own."""
    return SimpleNamespace(
        llama=LLAMA,
        bert=BERT,
        causal=CAUSAL,
        classifier={
            "type": "hf",
            "task": "sequence-classification",
            "config": BERT,
            "tokenizer": {"train": "wordpiece"},
        },
        texts=TEXTS,
        text_rows=text_rows,
        labelled_rows=labelled_rows,
        prepared=prepared,
    )


@pytest.fixture(params=CAUSAL)
def causal(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """(model, task, module) of a family, weights spread so that next tokens differ."""
    import torch

    model = prepared(CAUSAL[request.param], tmp_path / "processor")
    torch.manual_seed(0)
    module = model.module(tmp_path / "processor")
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model, model.task(tmp_path / "processor"), module.eval()
