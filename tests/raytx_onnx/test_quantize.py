"""int8 export: smaller, near the exact logits, and refused where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytx.artifact import Golden
from raytx.errors import ArtifactError
from raytx.files import read_json
from raytx_onnx.config import OnnxExport


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_int8_is_smaller_and_within_the_relative_limit(export: Any, family: str) -> None:
    made, config = export(family, quantize="dynamic"), OnnxExport(quantize="dynamic")
    exact = export(family).directory / "model.onnx"
    assert (made.directory / "model.onnx").stat().st_size < 0.75 * exact.stat().st_size
    golden = Golden(made.batches["padded"], made.live.logits(made.batches["padded"]))
    error = golden.relative_error(made.runner)
    assert 0 < error <= config.max_relative_error
    assert config.judge(difference=golden.difference(made.runner), relative_error=error) is None


def test_an_exact_graph_is_judged_by_its_absolute_difference() -> None:
    assert OnnxExport().judge(difference=1e-5, relative_error=0.5) is None
    assert "max_difference" in str(OnnxExport().judge(difference=1e-3, relative_error=0.0))


def test_an_int8_graph_is_judged_by_its_relative_error() -> None:
    config = OnnxExport(quantize="dynamic", max_relative_error=0.02)
    assert config.judge(difference=3.0, relative_error=0.01) is None
    assert "0.030 of the golden ones' norm, max_relative_error is 0.02" in str(
        config.judge(difference=1e-5, relative_error=0.03)
    )


def test_the_report_tells_sizes_and_error(export: Any) -> None:
    made = export("bert", quantize="dynamic")
    told = read_json(made.directory / "onnx_export.json")["quantization"]
    assert told["bytes"] == (made.directory / "model.onnx").stat().st_size < told["exact_bytes"]
    exact, int8 = (runner.logits(made.exportable.samples) for runner in (made.live, made.runner))
    assert told["relative_error"] == pytest.approx(np.linalg.norm(int8 - exact) / np.linalg.norm(exact), rel=1e-3)


def test_an_error_over_the_limit_refuses_the_export(export: Any, tmp_path: Path) -> None:
    config = OnnxExport(quantize="dynamic", exporter="torch", max_relative_error=1e-6)
    with pytest.raises(ArtifactError, match="max_relative_error is 1e-06; export without quantize"):
        config.build().save(export("bert").exportable, tmp_path)


def test_text_is_still_made_token_by_token(export: Any) -> None:
    made = export("llama", quantize="dynamic")
    answers = made.exportable.task.predict(made.runner, [{"prompt": "def", "max_tokens": 6}])
    assert answers[0]["completion_tokens"] == 6
