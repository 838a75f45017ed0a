"""The proof that an architecture keeps packed documents apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import parity_matrix as matrix
import pytest
import torch
from transformers import AutoModelForCausalLM

from raytx.errors import RecipeError
from raytx.tasks.causal_lm import CausalLM, _sample, pack
from raytx.testing import FakeTokenizer
from raytx_hf.architecture import base_config
from raytx_hf.model import HFModel
from raytx_torch import decoder_model

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


DECODERS = [family for family in matrix.FAMILIES if family.task == "causal-lm" and "adapter" not in family.model]


@pytest.mark.parametrize("family", DECODERS, ids=lambda family: family.name)
def test_a_documents_loss_is_the_same_packed_and_alone(family: matrix.Family) -> None:
    """With the task's own packing and collating: what a bin holds, and what training sees of it."""
    module = _module(family)
    rng = np.random.default_rng(5)
    documents = [rng.integers(5, 300, length).tolist() for length in (5, 11, 3, 17, 2, 9)]
    task = CausalLM(FakeTokenizer(), max_length=64)
    (packed,) = [_sample(bin_) for bin_ in pack(documents, 64)]
    alone = [_losses(module, task, [_sample([document])]) for document in documents]
    together = np.split(_losses(module, task, [packed]), np.cumsum([len(document) - 1 for document in documents])[:-1])
    for one, other in zip(alone, together, strict=True):
        assert other.mean() == pytest.approx(one.mean(), rel=1e-5)
    leaking = {**packed, "position_ids": list(range(len(packed["input_ids"])))}
    assert _losses(module, task, [leaking]).mean() != pytest.approx(np.concatenate(alone).mean(), rel=1e-4)


def _module(family: matrix.Family) -> Any:
    """Weights are large enough that a leak is more than rounding."""
    values = {key: value for key, value in family.model.items() if key != "tokenizer"}
    if family.model["type"] == "decoder":
        decoder_model.register()
        values = {"config": {"model_type": "raytx_decoder", **{k: v for k, v in values.items() if k != "type"}}}
    config = base_config(HFModel(task="causal-lm", tokenizer={"train": "bpe"}, config=values["config"]))
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return module


def _losses(module: Any, task: CausalLM, samples: list[Any]) -> np.ndarray:
    """Return the loss of each target, in order."""
    batch = {key: torch.from_numpy(value) for key, value in task.collate(samples).items()}
    labels = batch.pop("labels")[:, 1:].flatten()
    with torch.no_grad():
        logits = module(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none", ignore_index=-100)
    return losses[labels != -100].numpy()
