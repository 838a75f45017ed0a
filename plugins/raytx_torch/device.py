"""The device that a rank computes on."""

from __future__ import annotations

import os

import torch

from raytx.plan import Plan


def device_of(plan: Plan) -> torch.device:
    """Return the GPU that this rank was given, by the number it has among those the process sees, or the CPU."""
    if not plan.recipe.scaling.use_gpu:
        return torch.device("cpu")
    return torch.device(os.environ.get("RAYTX_DEVICE", f"cuda:{os.environ.get('LOCAL_RANK', 0)}"))
