"""The proof that an architecture keeps packed documents apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raytx.errors import RecipeError

BLOOM = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 320}


def test_an_architecture_that_leaks_is_refused_before_training(tiny: Any, tmp_path: Path) -> None:
    component = {"type": "hf", "task": "causal-lm", "config": BLOOM, "tokenizer": {"train": "bpe"}}
    with pytest.raises(RecipeError, match=r"'bloom' does not keep packed documents apart .* model\.packing=false"):
        tiny.prepared(component, tmp_path)


def test_an_architecture_that_leaks_may_train_unpacked(tiny: Any, tmp_path: Path) -> None:
    component = {"type": "hf", "task": "causal-lm", "config": BLOOM, "tokenizer": {"train": "bpe"}, "packing": False}
    model = tiny.prepared(component, tmp_path)
    task = model.task(tmp_path)
    batch = task.collate(list(task.features(tiny.text_rows(), lambda *_: None))[:2])
    loss = model.module(tmp_path)(**{key: torch.from_numpy(value) for key, value in batch.items()}).loss
    assert torch.isfinite(loss)


def test_the_proof_draws_nothing_from_the_generator(tiny: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    tiny.prepared(tiny.causal["llama"], tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())
