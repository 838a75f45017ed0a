"""The parity suite's recipes at sizes of a GPU, as many workers as there are GPUs.

RAYTX_GPU_SUITE=cpu runs the suite on the CPU, tiny, to try the suite itself: its bounds then mean nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import parity_matrix as matrix
import pytest
from rich.console import Console

from raytx.plan import Plan, resolve
from raytx.prepare import prepare
from raytx.recipe import Recipe, parse

sys.path.append(str(Path(__file__).parent))  # its tests share gpu_workers.py

ON = "RAYTX_GPU_SUITE"
WORDS = ("time", "person", "year", "way", "day", "thing", "man", "world", "life", "hand", "part", "child", "eye")


@dataclass(frozen=True)
class Size:
    """How large the suite's models and batches are."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    micro_batch: int


GPU = Size(hidden=1024, layers=8, heads=16, vocabulary=4096, length=512, micro_batch=4)
CPU = Size(hidden=32, layers=4, heads=4, vocabulary=320, length=32, micro_batch=2)


@dataclass(frozen=True)
class Accelerator:
    """What the suite runs on."""

    device: str
    count: int
    size: Size


@pytest.fixture(scope="session")
def accelerator() -> Accelerator:
    """The GPUs of this machine, or the CPU where it was asked for; skips where there is neither."""
    if os.environ.get(ON) == "cpu":
        return Accelerator("cpu", 2, CPU)
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"torch sees no GPU here (torch.cuda.is_available() is false); {ON}=cpu tries the suite itself")
    return Accelerator("cuda", torch.cuda.device_count(), GPU)


@pytest.fixture(scope="session")
def scaled(accelerator: Accelerator) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Give a model of the parity matrix the suite's size; whatever is not a size stays."""
    size = accelerator.size
    grown = {
        **dict.fromkeys(("hidden_size", "n_embd", "d_model"), size.hidden),
        **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"), size.layers),
        **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), size.heads),
        **dict.fromkeys(("intermediate_size", "d_ff"), 2 * size.hidden),
        **dict.fromkeys(("max_position_embeddings", "n_positions"), 2 * size.length),
        **dict.fromkeys(("head_dim", "d_kv"), size.hidden // size.heads),
        "num_key_value_heads": size.heads // 2,
        "vocab_size": size.vocabulary,
        "sliding_window": size.length // 4,
    }

    def larger(model: dict[str, Any]) -> dict[str, Any]:
        shape = model.get("config", model)
        changed = shape | {key: grown[key] for key in shape if key in grown and shape[key] is not None}
        whole = {**model, "config": changed} if "config" in model else changed
        return {**whole, "tokenizer": {"train": "bpe", "vocab_size": size.vocabulary}}

    return larger


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of unequal length, enough for twenty steps of the large size, the same on every machine."""
    directory = tmp_path_factory.mktemp("corpus")
    for number in range(400):
        words = (WORDS[(number * place + place // 7) % len(WORDS)] for place in range(1, 200 + 37 * (number % 19)))
        (directory / f"{number:03}.txt").write_text(" ".join(words))
    return directory


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of unequal length with one of two labels."""
    path = tmp_path_factory.mktemp("labelled") / "rows.csv"
    lines = ["text,label"]
    for row in range(600):
        text = " ".join(WORDS[row * place % len(WORDS)] for place in range(1, 30 + row % 90))
        lines.append(f"{text},{'good' if row % 3 else 'bad'}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def recipe(
    accelerator: Accelerator,
    scaled: Callable[[dict[str, Any]], dict[str, Any]],
    corpus: Path,
    labelled: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Recipe]:
    """Make the recipe of a family, alone or under a case, with dotted values replaced."""
    size, storage = accelerator.size, tmp_path_factory.mktemp("runs")
    places = {"text-files": corpus, "files": labelled}

    def make(name: str, family: matrix.Family, case: matrix.Case | None = None, **values: Any) -> Recipe:
        plain = {
            "name": name,
            "storage_path": str(storage),
            "model": scaled(family.model),
            "data": {"type": "text-files", "path": str(corpus), "split": {"test": 0.05}},
            "strategy": {"type": "single"},
            "optim": {"lr": 3e-4, "weight_decay": 0.1, "warmup": 3, "schedule": "cosine", "max_grad_norm": 0.5},
            "train": {
                "steps": 20,
                "global_batch_size": 4 * size.micro_batch,
                "micro_batch_size": size.micro_batch,
                "max_length": size.length,
                "seed": 3,
            },
            "evaluate": {"max_samples": 8},
            "scaling": {"use_gpu": accelerator.device == "cuda"},
        }
        chosen = matrix.values(family, case)
        data = {**plain["data"], **chosen.pop("data", {}), "split": plain["data"]["split"]}
        chosen |= {"model": plain["model"], "data": {**data, "path": str(places[data["type"]])}}
        return parse(plain).override(chosen | {key.replace("__", "."): value for key, value in values.items()})

    return make


@pytest.fixture(scope="session")
def prepared(recipe: Callable[..., Recipe]) -> Callable[[Recipe], Plan]:
    return lambda made: prepare(resolve(made), Console(quiet=True))[0]


@pytest.fixture(scope="session")
def on_workers(
    accelerator: Accelerator, prepared: Callable[[Recipe], Plan], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., list[Any]]]:
    """Do a job for a recipe in a group of workers; return what it returned on each rank."""
    import gpu_workers
    import ray

    from raytx import cluster

    ray.cloudpickle.register_pickle_by_value(gpu_workers)

    def run(job: Any, made: Recipe) -> list[Any]:
        return gpu_workers.run(job, prepared(made), tmp_path_factory.mktemp("workers"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        cluster.connect(num_cpus=accelerator.count if accelerator.device == "cpu" else None)
        yield run
        ray.shutdown()
