"""Write and read an ONNX directory: model.onnx, config, tokenizer, task, card, and a report of what export did."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx

from raytx.components import Compressor, Exportable, Model
from raytx.errors import ArtifactError
from raytx.files import write_json, write_text
from raytx.tasks.base import Runner
from raytx_onnx import graph
from raytx_onnx.config import OnnxExport
from raytx_onnx.quantize import to_int8
from raytx_onnx.runner import MODEL, REPORT, OnnxRunner
from raytx_onnx.signature import Signature, generates, signatures
from raytx_onnx.trace import TRACERS, quiet
from raytx_onnx.verify import difference, relative_error

LIBRARIES = ("onnx", "onnxruntime", "onnxscript", "torch", "transformers")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traced:
    """How the graph came to be."""

    graph: str
    tracer: str
    difference: float
    """Largest absolute difference to the module's logits, on batches and lengths that were not traced."""
    failures: list[str]
    """Why the attempts before this one were given up."""


class OnnxDirectory:
    """The exporter: a directory that ONNX Runtime, and whoever reads ONNX, can use."""

    def __init__(self, config: OnnxExport) -> None:
        self.config = config

    def save(self, exportable: Exportable, directory: Path) -> None:
        """Write the directory; raise ArtifactError when no graph comes out that agrees with the module."""
        exportable.module.eval()
        traced = self._trace(exportable, directory)
        quantization = self._quantize(exportable, directory) if self.config.quantize else None
        onnx.checker.check_model(directory / MODEL)
        exportable.module.config.save_pretrained(directory)
        exportable.task.tokenizer.save_pretrained(directory)
        exportable.task.save(directory)
        write_text(directory / "README.md", exportable.card)
        write_json(directory / REPORT, _report(exportable, traced, directory) | {"quantization": quantization})

    def load(self, directory: Path, model: Model, compressors: list[Compressor]) -> Runner:
        """Return the runner of a directory. A graph is data: nothing is unpickled, no custom operator is loaded."""
        return OnnxRunner(directory)

    def _trace(self, exportable: Exportable, directory: Path) -> Traced:
        """Try the better graph and tracer first; keep the first graph whose answers are the module's."""
        failures: list[str] = []
        for signature in signatures(exportable):
            for tracer in TRACERS if self.config.exporter == "auto" else [self.config.exporter]:
                try:
                    apart = self._attempt(exportable, signature, tracer, directory / MODEL)
                except Exception as error:  # a tracer compiles foreign code and may raise anything
                    failures.append(f"{signature.name} by {tracer}: {_first_line(error)}")
                    logger.warning("ONNX export gave up one way and tries the next: %s", failures[-1])
                else:
                    return Traced(signature.name, tracer, apart, failures)
        raise ArtifactError(f"this model could not be exported to ONNX. {'; '.join(failures)}")

    def _attempt(self, exportable: Exportable, signature: Signature, tracer: str, path: Path) -> float:
        """Trace, save and verify; return the difference to the module."""
        module = exportable.module
        with quiet():
            graph.save(TRACERS[tracer](module, signature, opset=self.config.opset), path)
            runner = OnnxRunner(path.parent)
        apart = difference(module, runner, exportable.samples, generates=generates(exportable))
        if not apart <= self.config.max_difference:
            limit = self.config.max_difference
            raise ArtifactError(f"its logits differ by {apart:.1e} from the model's, {limit:.0e} is allowed")
        return apart

    def _quantize(self, exportable: Exportable, directory: Path) -> dict[str, Any]:
        """Put the int8 graph in place of the exact one; return sizes and error, which must keep the limit."""
        path, samples = directory / MODEL, exportable.samples
        exact, exact_bytes = OnnxRunner(directory).logits(samples), graph.size(path)
        with quiet():
            to_int8(path)
        int8 = OnnxRunner(directory).logits(samples)
        error = relative_error(int8, exact, samples)
        apart = float(abs(int8 - exact).max())
        if (refusal := self.config.judge(difference=apart, relative_error=error)) is not None:
            raise ArtifactError(refusal)
        return {"type": "dynamic", "relative_error": error, "exact_bytes": exact_bytes, "bytes": graph.size(path)}


def _report(exportable: Exportable, traced: Traced, directory: Path) -> dict[str, Any]:
    """Return what onnx_export.json says: enough to run the graph without reading it, and to tell how it was made."""
    session = OnnxRunner(directory).session
    opsets = onnx.load(directory / MODEL, load_external_data=False).opset_import
    return {
        "opset": next(entry.version for entry in opsets if entry.domain in ("", "ai.onnx")),
        "graph": traced.graph,
        "exporter": traced.tracer,
        "difference": traced.difference,
        "given_up": traced.failures,
        "context_length": getattr(exportable.task, "context_length", None),
        "inputs": {value.name: value.shape for value in session.get_inputs()},
        "outputs": {value.name: value.shape for value in session.get_outputs()},
        "versions": {library: metadata.version(library) for library in LIBRARIES},
    }


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
