"""Turn an exported graph into its int8 form with ONNX Runtime's dynamic quantiser."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic


def to_int8(path: Path) -> None:
    """Replace a graph by one with int8 weights, whose activations are quantised as they come; same inputs and outputs.

    Weights are symmetric, one scale a channel, in 7 bits: without VNNI, x86 adds products of 8 and 8 bits in 16, which
    overflows (ONNX Runtime's guide, "U8S8").
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        result = Path(work) / path.name
        quantize_dynamic(path, result, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
        graph = onnx.load(result)
    onnx.save(graph, path)
