"""A graph on disk: one file where a protobuf message can hold the weights, else the weights in a file beside it."""

from __future__ import annotations

from pathlib import Path

import onnx_ir

PROTOBUF_LIMIT = 2_000_000_000
"""Bytes of weights that stay in the graph's own file; protobuf ends at 2 GiB."""


def save(model: onnx_ir.Model, path: Path) -> None:
    """Write a graph, replacing the one there, weights beside it (`model.onnx.data`) only where they must be."""
    beside = path.with_name(f"{path.name}.data")
    onnx_ir.external_data.load_to_model(model)  # it may still read from the file that is about to be replaced
    beside.unlink(missing_ok=True)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    onnx_ir.save(model, path, external_data=beside.name if weights > PROTOBUF_LIMIT else None)


def size(path: Path) -> int:
    """Return the bytes of a graph and the weights beside it."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))
