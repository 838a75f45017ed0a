"""The onnx export component: what a recipe may say of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from raytx.components import ExportConfig, Exporter


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

    def judge(self, *, difference: float, relative_error: float) -> str | None:
        """Return why the exported form is refused, or None: by its difference, or by its relative error with int8.

        int8 rounds weights and activations to a share of their range, so what it costs scales with the logits: a limit
        in absolute terms would say more of their scale than of the quantisation.
        """
        if self.quantize is None:
            return super().judge(difference=difference, relative_error=relative_error)
        if relative_error <= self.max_relative_error:
            return None
        return (
            f"int8 moves its logits by {relative_error:.3f} of the golden ones' norm, max_relative_error is "
            f"{self.max_relative_error:g}; export without quantize, or raise the limit"
        )

    def build(self) -> Exporter:
        from raytx_onnx.exporter import OnnxDirectory

        return OnnxDirectory(self)
