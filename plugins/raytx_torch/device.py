"""The device that a rank computes on."""

from __future__ import annotations

import torch

from raytx.plan import Plan


def device_of(plan: Plan) -> torch.device:
    """Return the GPU that was made this rank's current one when ranks met, or the CPU."""
    if not plan.recipe.scaling.use_gpu:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
