"""DeepSpeed ZeRO as raytx strategies."""

from __future__ import annotations

from raytx import hookimpl
from raytx.components import StrategyConfig
from raytx_deepspeed.strategy import DeepSpeed

RAYTX_API = 1


@hookimpl
def raytx_strategy() -> list[type[StrategyConfig]]:
    return [DeepSpeed]
