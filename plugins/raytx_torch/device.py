"""The device that a rank computes on."""

from __future__ import annotations

import torch

from raytx.plan import Plan


def device_of(plan: Plan) -> torch.device:
    """Return the GPU that Ray gave this worker, or the CPU."""
    if not plan.recipe.scaling.use_gpu:
        return torch.device("cpu")
    from ray.train.torch import get_device

    return get_device()
