"""DeepSpeed as raytx strategies: ZeRO, and its pipeline engine."""

from __future__ import annotations

from raytx import hookimpl
from raytx.components import StrategyConfig
from raytx_deepspeed.strategy import DeepSpeed
from raytx_deepspeed.three_d import DeepSpeed3D

RAYTX_API = 1


@hookimpl
def raytx_strategy() -> list[type[StrategyConfig]]:
    return [DeepSpeed, DeepSpeed3D]
