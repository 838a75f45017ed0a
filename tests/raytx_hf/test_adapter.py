"""Low-rank adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raytx.errors import RecipeError
from raytx.registry import registry

LORA = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.1}


def _trained(module: Any, batch: dict[str, np.ndarray]) -> Any:
    """Take two big steps, so that adapters matter."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=5.0)
    for _ in range(2):
        module.train()(**{key: torch.from_numpy(value) for key, value in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return module


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_model_answers_as_the_adapted_one_and_is_a_plain_class(tiny: Any, family: str, tmp_path: Path) -> None:
    model = tiny.prepared({**tiny.causal[family], "adapter": LORA}, tmp_path)
    torch.manual_seed(0)
    module = model.module(tmp_path, activation_checkpointing=True)
    task = model.task(tmp_path)
    samples = list(task.features(tiny.text_rows(), lambda *_: None))
    golden = task.golden(samples[:2])
    untrained = model.runner(module).logits(golden)
    _trained(module, task.collate(samples[:2]))
    adapted = model.runner(module).logits(golden)
    merged = model.merged(module)
    assert type(merged).__module__.startswith("transformers.models.")
    assert np.abs(adapted - untrained).max() > 1e-2
    assert np.abs(model.runner(merged).logits(golden) - adapted).max() <= 1e-5
    assert merged.config.use_cache is True


def test_a_classifier_trains_its_head_besides_the_adapters(tiny: Any, tmp_path: Path) -> None:
    component = {**tiny.classifier, "adapter": LORA}
    model = tiny.prepared(component, tmp_path, rows=tiny.labelled_rows)
    module = model.module(tmp_path)
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or "classifier" in name for name in trained)
    assert any("classifier" in name for name in trained)
    task = model.task(tmp_path)
    samples = list(task.features(tiny.labelled_rows(), lambda *_: None))
    golden = task.golden(samples[:3])
    adapted = model.runner(_trained(module, task.collate(samples[:4]))).logits(golden)
    assert np.abs(model.runner(model.merged(module)).logits(golden) - adapted).max() <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_size_counts_adapters_as_the_trainable_part(tiny: Any, family: str, tmp_path: Path) -> None:
    component = {**tiny.causal[family], "adapter": LORA}
    module = tiny.prepared(component, tmp_path).module(tmp_path)
    size = registry().parse("model", component).size()
    assert size.parameters == sum(p.numel() for p in module.parameters())
    assert size.trainable == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert 0 < size.trainable < size.parameters / 2


def test_an_unknown_target_is_refused_with_the_nearest(tiny: Any) -> None:
    component = {**tiny.causal["llama"], "adapter": {**LORA, "target_modules": ["q_pro"]}}
    with pytest.raises(RecipeError, match=r"no layer 'q_pro'. Did you mean 'q_proj'"):
        registry().parse("model", component).size()


def test_named_targets_alone_get_adapters(tiny: Any, tmp_path: Path) -> None:
    component = {**tiny.causal["llama"], "adapter": {**LORA, "target_modules": ["v_proj"]}}
    module = tiny.prepared(component, tmp_path).module(tmp_path)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert len(trained) == 4
    assert all("v_proj" in name for name in trained)
