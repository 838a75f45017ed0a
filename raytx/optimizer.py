"""The optimizer of a recipe: its torch object, the state it keeps of a parameter, and what it cannot do.

torch and bitsandbytes are imported when an optimizer is built: whatever only reads recipes does without them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from raytx.recipe import Recipe
    from raytx.sections import Optim

CLASSES = {
    "adamw": ("torch.optim", "AdamW"),
    "sgd": ("torch.optim", "SGD"),
    "adafactor": ("torch.optim", "Adafactor"),
    "adamw_8bit": ("bitsandbytes.optim", "AdamW8bit"),
}
FUSED_DEVICES = frozenset({"cpu", "cuda", "xpu"})
"""Devices on which torch has one kernel for the update of AdamW. The one for SGD takes no sharded parameters."""
BITSANDBYTES = (0, 50)
"""The oldest bitsandbytes used: before it, 8-bit updates run on GPUs only."""
QUANTISED_FROM = 4096
"""Elements from which adamw_8bit keeps one byte a moment; smaller parameters keep fp32."""
BLOCK = 256
"""Elements of a moment that share one scale, and values that one byte can mean."""


def build(optim: Optim, groups: Sequence[Mapping[str, Any]], *, device_type: str) -> Any:
    """Return the torch optimizer of parameter groups that live on a device, such as "cpu" or "cuda".

    Groups are those of `parameter_groups`: weight decay is theirs.
    """
    module, name = CLASSES[optim.type]
    return getattr(import_module(module), name)(
        [dict(group) for group in groups], lr=optim.lr, **_settings(optim), **_fused(optim, device_type)
    )


def _settings(optim: Optim) -> dict[str, Any]:
    match optim.type:
        case "adamw" | "adamw_8bit":
            return {"betas": optim.betas, "eps": optim.eps}
        case "sgd":
            return {"momentum": optim.momentum, "nesterov": optim.nesterov}
        case "adafactor":  # 1e-3 and 1 are the paper's least step and its clipping of an update
            return {"beta2_decay": optim.beta2_decay, "eps": (optim.eps, 1e-3), "d": 1.0}


def _fused(optim: Optim, device_type: str) -> dict[str, bool]:
    """Saying False would also turn off torch's next best, so nothing is said instead."""
    able = optim.type == "adamw" and device_type in FUSED_DEVICES
    return {"fused": True} if (able if optim.fused is None else optim.fused) else {}


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


# ----------------------------------------------------------------------------------------------------------- state


class StateTensor(NamedTuple):
    """One tensor that an optimizer keeps of a parameter."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (1 if self.dtype == "uint8" else 4)


def state_tensors(optim: Optim, shape: Sequence[int]) -> dict[str, StateTensor]:
    """Return the state kept of a parameter of a shape, by torch's names and besides "step".

    All of it is zero before the first update, save qmap1 and qmap2: they are constants, what each byte means.
    """
    whole = StateTensor(tuple(shape))
    match optim.type:
        case "adamw":
            return {"exp_avg": whole, "exp_avg_sq": whole}
        case "sgd":
            return {"momentum_buffer": whole} if optim.momentum else {}
        case "adafactor":
            return _factored(whole.shape) if len(whole.shape) > 1 else {"variance": whole}
        case "adamw_8bit":
            small = math.prod(whole.shape) < QUANTISED_FROM
            return {"state1": whole, "state2": whole} if small else _quantised(whole.shape)


def _factored(shape: tuple[int, ...]) -> dict[str, StateTensor]:
    *outer, rows, columns = shape
    return {"row_var": StateTensor((*outer, rows, 1)), "col_var": StateTensor((*outer, 1, columns))}


def _quantised(shape: tuple[int, ...]) -> dict[str, StateTensor]:
    scales, meanings = StateTensor((math.ceil(math.prod(shape) / BLOCK),)), StateTensor((BLOCK,))
    return {
        f"{name}{moment}": tensor
        for moment in (1, 2)
        for name, tensor in (("state", StateTensor(shape, "uint8")), ("qmap", meanings), ("absmax", scales))
    }


def state_parts(optim: Optim, shape: Sequence[int]) -> tuple[str, ...]:
    """Return the names of the state tensors besides "step" that are kept of a parameter of a shape."""
    return tuple(state_tensors(optim, shape))


def state_bytes(optim: Optim, shape: Sequence[int]) -> int:
    """Return the bytes of a parameter's state; what all parameters share, the meaning of a byte, is not counted."""
    return sum(t.nbytes for name, t in state_tensors(optim, shape).items() if not name.startswith("qmap"))


# -------------------------------------------------------------------------------------------------------- refusals


def uncuttable(optim: Optim) -> str | None:
    """Return why ranks must not share a parameter under this optimizer, or None where each element is for itself."""
    reasons = {
        "adafactor": "scales each update by the norms of whole parameters",
        "adamw_8bit": "scales moments by blocks of whole parameters",
    }
    if optim.type not in reasons:
        return None
    return (
        f"optim.type={optim.type} {reasons[optim.type]}, so ranks that hold parts of them would train another model; "
        "use adamw or sgd, or a strategy that leaves parameters whole, such as ddp"
    )


def refusal(recipe: Recipe) -> str | None:
    """Return why the updates that a recipe asks for cannot be done here, or None."""
    if recipe.train.precision == "fp16" and not recipe.scaling.use_gpu:
        return "train.precision=fp16 needs scaling.use_gpu=true; on CPU use bf16 or fp32"
    if recipe.optim.type == "adamw_8bit" and _release(version := _bitsandbytes()) < BITSANDBYTES:
        oldest = ".".join(map(str, BITSANDBYTES))
        return (
            f"optim.type=adamw_8bit needs bitsandbytes {oldest} or newer, {version or 'none'} is installed: "
            "pip install -U bitsandbytes, or use adamw, or adafactor, which takes even less memory"
        )
    return None


def _bitsandbytes() -> str:
    """Return the version of bitsandbytes that is installed; "" where there is none."""
    try:
        return metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        return ""


def _release(version: str) -> tuple[int, ...]:
    """Return major and minor of a version, (0, 50) of 0.50rc1."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
