"""Components that need torch alone: the small decoder, text files, single, ddp and fsdp, pruning, int8."""

from __future__ import annotations

from raytx import hookimpl
from raytx.components import CompressionConfig, DataConfig, ModelConfig, StrategyConfig
from raytx_torch.decoder import DecoderConfig
from raytx_torch.int8 import DynamicInt8
from raytx_torch.pruning import L1Pruning
from raytx_torch.strategies import DDP, FSDP, Single
from raytx_torch.text_files import TextFiles

RAYTX_API = 1


@hookimpl
def raytx_model() -> list[type[ModelConfig]]:
    return [DecoderConfig]


@hookimpl
def raytx_data() -> list[type[DataConfig]]:
    return [TextFiles]


@hookimpl
def raytx_strategy() -> list[type[StrategyConfig]]:
    return [Single, DDP, FSDP]


@hookimpl
def raytx_compression() -> list[type[CompressionConfig]]:
    return [L1Pruning, DynamicInt8]
