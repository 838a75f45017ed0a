"""The ONNX directory: what it holds, that it answers as the model does, and what happens where it cannot."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from raytx.artifact import Golden
from raytx.errors import ArtifactError
from raytx.files import read_json
from raytx.registry import registry
from raytx_onnx import trace
from raytx_onnx.config import OnnxExport

FAMILIES = ("llama", "gpt2", "decoder", "gpt", "bert")
CACHED = ("llama", "gpt2", "decoder")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_on_padded_batches_of_sizes_that_were_not_traced(export: Any, family: str) -> None:
    made = export(family)
    for batch in (made.batches["padded"], made.batches["one"]):
        golden = Golden(batch, made.live.logits(batch))
        assert golden.difference(made.runner) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_compared_differ_by_far_more_than_what_is_allowed(export: Any, family: str) -> None:
    """Else a graph that ignores its inputs would agree as well."""
    made = export(family)
    logits = made.live.logits(made.batches["padded"])
    assert np.abs(logits - logits[:1]).max() > 100 * 1e-4


@pytest.mark.parametrize("family", CACHED)
def test_decoders_become_one_graph_with_a_cache_traced_by_transformers(export: Any, family: str) -> None:
    report = read_json(export(family).directory / "onnx_export.json")
    assert (report["graph"], report["exporter"], report["given_up"]) == ("with-past", "transformers", [])


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_models_without_a_cache_become_a_single_pass_graph(export: Any, family: str) -> None:
    assert read_json(export(family).directory / "onnx_export.json")["graph"] == "single-pass"


def test_inputs_outputs_and_axes_have_clean_names(export: Any) -> None:
    report = read_json(export("llama").directory / "onnx_export.json")
    assert list(report["inputs"])[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    assert report["inputs"]["input_ids"] == ["batch", "length"]
    assert report["inputs"]["past_key_values.1.value"] == ["batch", 2, "past", 8]
    assert report["outputs"]["logits"] == ["batch", "length", 320]
    assert report["outputs"]["present.1.value"] == ["batch", 2, "total", 8]


def test_a_classifier_takes_every_input_its_tokenizer_gives(export: Any) -> None:
    report = read_json(export("bert").directory / "onnx_export.json")
    assert report["inputs"].keys() == {"input_ids", "attention_mask", "token_type_ids"}
    assert report["outputs"] == {"logits": ["batch", 2]}


def test_the_directory_holds_all_that_serving_needs_and_no_second_weights_file(export: Any) -> None:
    directory = export("bert").directory
    names = {path.name for path in directory.iterdir()}
    wanted = {"model.onnx", "config.json", "tokenizer.json", "raytx_task.json", "README.md", "onnx_export.json"}
    assert wanted <= names
    assert not any(name.endswith(".data") for name in names)
    task = export("bert").exportable.model.task(directory)
    assert task.label_names() == ["code", "prose"]
    assert (directory / "README.md").read_text() == "# A tiny model\n"


def test_the_graph_is_valid_onnx_and_carries_no_paths_of_whoever_exported_it(export: Any) -> None:
    path = export("llama").directory / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    assert b"site-packages" not in path.read_bytes()
    assert str(Path.cwd()).encode() not in path.read_bytes()


def test_predictions_of_a_classifier_are_those_of_the_live_model(export: Any) -> None:
    made = export("bert")
    requests = [{"text": "import sys"}, {"text": "the lazy dog jumps over a very quick brown fox"}]
    wanted, got = (made.exportable.task.predict(runner, requests) for runner in (made.live, made.runner))
    assert [answer["label"] for answer in got] == [answer["label"] for answer in wanted]
    probabilities = [[answer["probabilities"] for answer in answers] for answers in (got, wanted)]
    np.testing.assert_allclose(probabilities[0], probabilities[1], atol=1e-5)


def test_plain_torch_traces_the_same_inputs_outputs_and_logits(export: Any) -> None:
    by_torch, by_transformers = export("llama", exporter="torch", opset=18), export("llama")
    reports = [read_json(made.directory / "onnx_export.json") for made in (by_torch, by_transformers)]
    assert (reports[0]["exporter"], reports[0]["opset"]) == ("torch", 18)
    assert [reports[0][key] for key in ("inputs", "outputs")] == [reports[1][key] for key in ("inputs", "outputs")]
    golden = Golden(by_torch.batches["padded"], by_torch.live.logits(by_torch.batches["padded"]))
    assert golden.difference(by_torch.runner) <= 1e-4


def test_where_transformers_cannot_trace_torch_does_and_the_report_says_so(
    export: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("no lowering for this operator")

    monkeypatch.setitem(trace.TRACERS, "transformers", fails)
    with caplog.at_level(logging.WARNING):
        OnnxExport().build().save(export("bert").exportable, tmp_path)
    report = read_json(tmp_path / "onnx_export.json")
    assert report["exporter"] == "torch"
    reason = "single-pass by transformers: NotImplementedError: no lowering for this operator"
    assert report["given_up"] == [reason]
    assert reason in caplog.text


def test_a_graph_that_answers_otherwise_than_the_model_is_refused(
    export: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    exportable = export("bert").exportable

    def of_another_model(module: Any, signature: Any, **options: Any) -> Any:
        other = copy.deepcopy(module)
        with torch.no_grad():
            other.classifier.bias.add_(0.5)
        return by_torch(other, signature, **options)

    by_torch = trace.by_torch
    monkeypatch.setitem(trace.TRACERS, "torch", of_another_model)
    with pytest.raises(ArtifactError, match=r"its logits differ by 5\.0e-01 from the model's, 1e-04 is allowed"):
        OnnxExport(exporter="torch").build().save(exportable, tmp_path)


def test_exporting_prints_nothing(export: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    OnnxExport().build().save(export("bert").exportable, tmp_path)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_loading_a_directory_needs_no_model(export: Any) -> None:
    made = export("bert")
    runner = OnnxExport().build().load(made.directory, None, [])  # type: ignore[arg-type]
    batch = made.batches["padded"]
    np.testing.assert_allclose(runner.logits(batch), made.live.logits(batch), atol=1e-4)


def test_int8_modules_are_refused_with_the_way_out() -> None:
    assert "quantize: dynamic" in OnnxExport().conflicts["int8-modules"]


def test_the_component_is_found_by_its_type() -> None:
    assert registry().find("export", "onnx") is OnnxExport
