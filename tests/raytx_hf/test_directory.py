"""The Hugging Face directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from raytx.components import Exportable
from raytx.errors import ArtifactError
from raytx.registry import registry

SHARDED = {"type": "hf", "max_shard_size": "20KB"}


class Halved(nn.Module):
    """A linear layer that keeps its weights as fp16 in a buffer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("narrow", linear.weight.detach().half())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.narrow.float().T


class Halving:
    """A compressor that changes the structure: feed-forward layers become Halved."""

    def convert(self, module: Any) -> Any:
        for layer in module.model.layers:
            layer.mlp.down_proj = Halved(layer.mlp.down_proj)
        return module

    restore = convert


class Zeroing:
    """A compressor that changes values alone."""

    def convert(self, module: Any) -> Any:
        with torch.no_grad():
            module.get_output_embeddings().weight[:, 0] = 0
        return module

    def restore(self, module: Any) -> Any:
        return module


def _exportable(model: Any, task: Any, module: Any, texts: Any, **more: Any) -> Exportable:
    samples = list(task.features(texts, lambda *_: None))
    return Exportable(model, model.merged(module), task, task.golden(samples[:3]), "# a card\n", **more)


def _export(type_: str | dict[str, Any] = "hf") -> Any:
    return registry().parse("export", {"type": type_} if isinstance(type_, str) else type_).build()


def _difference(exporter: Any, exportable: Exportable, directory: Path) -> float:
    runner = exporter.load(directory, exportable.model, exportable.compressors)
    live = exportable.model.runner(exportable.module).logits(exportable.samples)
    return float(np.abs(runner.logits(exportable.samples) - live).max())


def test_a_saved_directory_is_complete_and_answers_the_same(causal: Any, tiny: Any, tmp_path: Path) -> None:
    exportable = _exportable(*causal, tiny.text_rows())
    (out := tmp_path / "out").mkdir()
    _export().save(exportable, out)
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md"}
    assert (out / "README.md").read_text() == "# a card\n"
    assert json.loads((out / "config.json").read_text())["use_cache"] is True
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == causal[1].eos
    assert _difference(_export(), exportable, out) == 0.0
    assert exportable.model.task(out).state() == causal[1].state()


def test_big_weights_are_cut_into_several_files(causal: Any, tiny: Any, tmp_path: Path) -> None:
    exportable = _exportable(*causal, tiny.text_rows())
    (out := tmp_path / "out").mkdir()
    _export(SHARDED).save(exportable, out)
    assert len(list(out.glob("*.safetensors"))) > 1
    assert _difference(_export(SHARDED), exportable, out) == 0.0


def test_a_classifier_keeps_its_label_names(tiny: Any, tmp_path: Path) -> None:
    model = tiny.prepared(tiny.classifier, tmp_path / "processor", rows=tiny.labelled_rows)
    task = model.task(tmp_path / "processor")
    exportable = _exportable(model, task, model.module(tmp_path / "processor"), tiny.labelled_rows())
    (out := tmp_path / "out").mkdir()
    _export().save(exportable, out)
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "code", "1": "prose"}
    assert model.task(out).label_names() == ["code", "prose"]
    assert _difference(_export(), exportable, out) == 0.0


@pytest.mark.parametrize("family", ["llama", "decoder"])
def test_a_module_of_changed_structure_is_restored(family: str, tiny: Any, tmp_path: Path) -> None:
    model = tiny.prepared(tiny.causal[family], tmp_path / "processor")
    task = model.task(tmp_path / "processor")
    module = Halving().convert(model.module(tmp_path / "processor"))
    exportable = _exportable(model, task, module, tiny.text_rows(), compressors=[Halving()])
    (out := tmp_path / "out").mkdir()
    _export().save(exportable, out)
    assert _difference(_export(), exportable, out) == 0.0


def test_a_compressor_that_changes_values_alone_leaves_a_plain_directory(
    causal: Any, tiny: Any, tmp_path: Path
) -> None:
    model, task, module = causal
    exportable = _exportable(model, task, Zeroing().convert(module), tiny.text_rows(), compressors=[Zeroing()])
    (out := tmp_path / "out").mkdir()
    _export().save(exportable, out)
    assert torch.equal(model.load(out).get_output_embeddings().weight, module.get_output_embeddings().weight)
    assert _difference(_export(), exportable, out) == 0.0


def test_a_state_that_is_no_tensor_is_refused(tiny: Any, tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            return ("packed", 1)

    model = tiny.prepared(tiny.causal["llama"], tmp_path / "processor")
    module = model.module(tmp_path / "processor")
    module.model.layers[0].mlp.down_proj = Odd(64, 32, bias=False)
    exportable = _exportable(
        model, model.task(tmp_path / "processor"), module, tiny.text_rows(), compressors=[Zeroing()]
    )
    (out := tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match="is no tensor; safetensors cannot hold it"):
        _export().save(exportable, out)
