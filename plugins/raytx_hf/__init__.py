"""The Hugging Face plugin: transformers models, datasets as rows, LoRA, and the public directory format."""

from __future__ import annotations

from raytx import hookimpl
from raytx.components import DataConfig, ExportConfig, ModelConfig
from raytx_hf.export import HFExport
from raytx_hf.model import HFModel
from raytx_hf.sources import Files, Hub

RAYTX_API = 1


@hookimpl
def raytx_model() -> list[type[ModelConfig]]:
    return [HFModel]


@hookimpl
def raytx_data() -> list[type[DataConfig]]:
    return [Files, Hub]


@hookimpl
def raytx_export() -> list[type[ExportConfig]]:
    return [HFExport]
