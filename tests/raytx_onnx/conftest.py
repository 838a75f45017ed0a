"""Tiny trained-tokenizer models of five families, and their ONNX exports, each made once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from raytx.components import Exportable
from raytx.registry import registry
from raytx.tasks.base import Features, Runner
from raytx_onnx.config import OnnxExport
from raytx_onnx.runner import OnnxRunner

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "def f(x):\n    return x + 1\n",
    "pack my box with five dozen liquor jugs and then some more of them",
    "import os\nimport sys\nprint(os.getcwd())\n",
    "how vexingly quick daft zebras jump",
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "type": "hf",
        "task": "causal-lm",
        "config": {"model_type": "llama", "vocab_size": 320, "num_key_value_heads": 2, **SIZES},
        "tokenizer": {"train": "bpe"},
    },
    "gpt2": {
        "type": "hf",
        "task": "causal-lm",
        "config": {"model_type": "gpt2", "vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "tokenizer": {"train": "bpe"},
    },
    "decoder": {"type": "decoder", "vocab_size": 320, "num_key_value_heads": 2, **SIZES},
    "gpt": {  # the first GPT keeps no cache
        "type": "hf",
        "task": "causal-lm",
        "packing": False,
        "config": {"model_type": "openai-gpt", "vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4},
        "tokenizer": {"train": "bpe"},
    },
    "bert": {
        "type": "hf",
        "task": "sequence-classification",
        "config": {"model_type": "bert", "vocab_size": 200, **SIZES},
        "tokenizer": {"train": "wordpiece"},
    },
}


@dataclass(frozen=True)
class Export:
    """One model, the ONNX directory made from it, and the runners of both."""

    exportable: Exportable
    directory: Path
    live: Runner
    batches: dict[str, Features]
    """Collated batches by what is special about them."""

    @property
    def runner(self) -> OnnxRunner:
        return OnnxRunner(self.directory)


def rows() -> Iterator[dict[str, Any]]:
    return ({"text": text, "label": "code" if "\n" in text else "prose"} for text in TEXTS * 4)


def unexpected(index: int, reason: str) -> None:
    raise AssertionError(f"row {index}: {reason}")


def live(family: str, directory: Path) -> tuple[Exportable, Runner, dict[str, Features]]:
    """Make a family's model with weights large enough for its logits to differ well."""
    model = registry().parse("model", FAMILIES[family]).build()
    directory.mkdir(exist_ok=True)
    model.fit(rows, directory, max_length=48)
    task = model.task(directory)
    torch.manual_seed(0)
    module = model.merged(model.module(directory))
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)
    samples = list(task.features(rows(), unexpected))
    batches = {
        "packed": task.collate(samples[:2]),
        "padded": task.golden(samples[:4]),
        "one": task.golden(samples[1:2]),
    }
    exportable = Exportable(model=model, module=module, task=task, samples=batches["padded"], card="# A tiny model\n")
    return exportable, model.runner(module), batches


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Export]:
    """Export a family with options of the component; equal calls share one directory."""

    @functools.cache
    def make(family: str, **options: Any) -> Export:
        place = tmp_path_factory.mktemp(family)
        exportable, runner, batches = live(family, place / "processor")
        (place / "onnx").mkdir()
        OnnxExport(**options).build().save(exportable, place / "onnx")
        return Export(exportable, place / "onnx", runner, batches)

    return make
