"""The onnx export component: what a recipe may say of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from raytx.components import ExportConfig, Exporter
from raytx.tasks.base import Runner

if TYPE_CHECKING:
    from raytx.artifact import Golden


class OnnxExport(ExportConfig):
    """One ONNX graph with dynamic batch and length, run by ONNX Runtime."""

    type: Literal["onnx"] = "onnx"
    opset: int | None = Field(None, ge=17)
    """ONNX operator set; null takes the newest one the exporter writes without conversion."""
    quantize: Literal["dynamic"] | None = None
    """dynamic stores int8 weights and quantises activations as they come (ONNX Runtime); null keeps fp32."""
    exporter: Literal["auto", "transformers", "torch"] = "auto"
    """Who traces the model: transformers' exporter, plain torch.onnx, or auto: the first, else the second."""
    max_relative_error: float = Field(0.05, gt=0)
    """With quantize, in place of max_difference: largest allowed ||int8 - golden|| / ||golden|| of the logits."""

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"save_pretrained"})

    @property
    def conflicts(self) -> Mapping[str, str]:
        return {
            "int8-modules": "its int8 layers call torch operators that ONNX lacks; set quantize: dynamic here instead"
        }

    def distance(self, golden: Golden, runner: Runner) -> tuple[float, float]:
        """Return how far a runner is from the golden logits, and how far it may be: absolute, or relative with int8.

        int8 rounds weights and activations to a share of their range, so what it costs scales with the logits: a limit
        in absolute terms would say more of their scale than of the quantisation.
        """
        if self.quantize is None:
            return golden.difference(runner), self.max_difference
        return golden.relative_error(runner), self.max_relative_error

    def build(self) -> Exporter:
        from raytx_onnx.exporter import OnnxDirectory

        return OnnxDirectory(self)
