"""Which parameters decay: matrices and embeddings do, norms and biases do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def parameter_groups(parameters: Mapping[str, Any], *, weight_decay: float) -> list[dict[str, Any]]:
    """Return the two groups that an optimizer takes, without empty ones.

    A parameter of one dimension (a norm's scale, a bias) shifts or scales activations and gains nothing from being
    pulled to zero, so only the others decay. Partitioned parameters tell their whole shape as `ds_shape`.
    """
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for parameter in parameters.values():
        groups[len(getattr(parameter, "ds_shape", parameter.shape)) > 1].append(parameter)
    return [
        {"params": chosen, "weight_decay": weight_decay if decays else 0.0}
        for decays, chosen in groups.items()
        if chosen
    ]
