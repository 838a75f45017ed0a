"""Trace a module into an ONNX graph, by transformers' exporter or by torch's alone, and tidy what comes out."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir
import torch
from transformers import DynamicCache

from raytx_onnx.signature import Axes, Signature

PAST_AXES: Axes = ("batch", "heads", "past")
NOISY = ("torch.onnx", "torch.export", "transformers", "onnxscript", "onnx_ir", "onnxruntime", "root")

Tracer = Callable[..., onnx_ir.Model]


def by_transformers(module: Any, signature: Signature, *, opset: int | None) -> onnx_ir.Model:
    """Trace with `transformers.exporters` (experimental there), which mends patterns that torch.onnx cannot lower."""
    from transformers.exporters import OnnxConfig, OnnxExporter

    auto = torch.export.Dim.AUTO
    samples: dict[str, Any] = dict(signature.inputs)
    shapes: dict[str, Any] = {name: {0: auto, 1: auto} for name in samples}
    if signature.past:
        samples["past_key_values"] = DynamicCache(signature.past)
        shapes["past_key_values"] = [{0: auto, 2: auto}] * (2 * len(signature.past))
    if getattr(module.config, "use_cache", None) is not None:
        samples["use_cache"] = bool(signature.past)
    exported = OnnxExporter().export(module, samples, OnnxConfig(dynamic_shapes=shapes, opset_version=opset))
    return _tidy(exported.program, signature)


def by_torch(module: Any, signature: Signature, *, opset: int | None) -> onnx_ir.Model:
    """Trace with `torch.onnx.export`, which names the axes itself."""
    dim = {name: torch.export.Dim.DYNAMIC for name in ("batch", "length", "total", "past")}
    shapes = {name: {place: dim[axis] for place, axis in enumerate(axes)} for name, axes in signature.axes.items()}
    pairs = [tuple({0: dim["batch"], 2: dim["past"]} for _ in range(2)) for _ in signature.past]
    program = torch.onnx.export(
        _Flat(module, list(signature.inputs)).eval(),
        (*signature.inputs.values(), signature.past),
        dynamo=True,
        dynamic_shapes={"inputs": (*shapes.values(), pairs)},
        opset_version=opset,
        verbose=False,
    )
    assert program is not None
    return _tidy(program.model, signature)


TRACERS: dict[str, Tracer] = {"transformers": by_transformers, "torch": by_torch}
"""In the order in which `exporter: auto` tries them."""


class _Flat(torch.nn.Module):
    """A module that takes and returns tensors only: a cache goes in and out as pairs of keys and values."""

    def __init__(self, module: Any, names: list[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *inputs: Any) -> Any:
        *plain, past = inputs
        named = dict(zip(self.names, plain, strict=True))
        if not past:
            return self.module(**named).logits
        output = self.module(**named, past_key_values=DynamicCache(past), use_cache=True)
        return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]


def _tidy(model: onnx_ir.Model, signature: Signature) -> onnx_ir.Model:
    """Give inputs, outputs and axes the names that optimum made common, and drop what only the tracer needs."""
    graph = model.graph
    _keep_outputs(graph, 1 + len(signature.present_names))
    axes = signature.axes | dict.fromkeys(signature.past_names, PAST_AXES)
    for value, name in zip(graph.inputs, axes, strict=True):
        _rename(value, name, axes[name])
    logits, *present = graph.outputs
    # (batch, length, vocabulary) of a decoder or token tagger, (batch, labels) of a classifier
    _rename(logits, "logits", ("batch", "length")[: len(_shape(logits)) - 1])
    for value, name in zip(present, signature.present_names, strict=True):
        _rename(value, name, ("batch", "heads", "total"))
    for node in graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of whoever exported
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape = value.type = None  # axes named s43; ONNX Runtime infers them again
    return model


def _keep_outputs(graph: onnx_ir.Graph, count: int) -> None:
    """Leave the logits and the cache; a model may return more."""
    kept = [value for value in graph.outputs if value.name == "logits" or "past_key_values" in str(value.name)]
    if len(graph.outputs) > count and len(kept) == count:
        graph.outputs[:] = kept
    assert len(graph.outputs) == count, [value.name for value in graph.outputs]


def _rename(value: onnx_ir.Value, name: str, axes: Axes) -> None:
    """Name a graph input or output and its dynamic axes; a fixed axis (heads) keeps its number."""
    shape = _shape(value)
    named = [axis if axis != "heads" else shape[place] for place, axis in enumerate(axes)]
    value.name = name
    value.shape = onnx_ir.Shape([*named, *shape[len(named) :]])


def _shape(value: onnx_ir.Value) -> list[int | str]:
    """A value's sizes; a size that transformers marked dynamic but the trace fixed comes as text."""
    assert value.shape is not None, value.name
    return [int(size) if str(size).isdigit() else str(size) for size in value.shape]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what tracers print, log and warn; errors still come as exceptions."""
    loggers = [logging.getLogger(None if name == "root" else name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
