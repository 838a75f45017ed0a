"""ONNX: export to one graph with dynamic axes, run by ONNX Runtime."""

from raytx import hookimpl
from raytx.components import ExportConfig
from raytx_onnx.config import OnnxExport

RAYTX_API = 1


@hookimpl
def raytx_export() -> list[type[ExportConfig]]:
    return [OnnxExport]
