"""The plugin: what it provides to raytx."""

from __future__ import annotations

from raytx import hookimpl
from raytx.components import CompressionConfig, ModelConfig
from raytx_example_plugin.gated_conv import GatedConv
from raytx_example_plugin.svd import SVD

RAYTX_API = 1


@hookimpl
def raytx_model() -> list[type[ModelConfig]]:
    return [GatedConv]


@hookimpl
def raytx_compression() -> list[type[CompressionConfig]]:
    return [SVD]
