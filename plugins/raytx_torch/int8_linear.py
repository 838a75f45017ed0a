"""A linear layer with int8 weights, run by torch's quantised CPU kernels."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """y = x W^T + b with W = scale * int8 weight, one scale an output; x is quantised to 7 bits as it comes.

    Kernels want the weight in a layout of their own: it is packed at the first call and never saved.
    """

    weight: Tensor
    """(outputs, inputs), int8."""
    scale: Tensor
    """(outputs,), float32."""
    bias: Tensor | None
    """(outputs,), float32."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self._packed: Any = None

    @classmethod
    def quantized(cls, layer: nn.Module) -> Int8Linear:
        """Round a linear layer's weights: each output's largest one becomes 127 or -127."""
        weight, bias = _matrix(layer).detach().float(), _bias(layer)
        # A row of zeros has no range; any scale keeps it zero.
        scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        rounded = (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        return cls(rounded, scale, None if bias is None else bias.detach().float().clone())

    @classmethod
    def empty_like(cls, layer: nn.Module) -> Int8Linear:
        """Return the layer of a linear layer's shape whose state dict is yet to be loaded."""
        weight, bias = _matrix(layer), _bias(layer)
        outputs = weight.new_zeros(len(weight), dtype=torch.float32)
        return cls(
            torch.zeros_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format),
            outputs,
            None if bias is None else outputs.clone(),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.device.type != "cpu":  # the kernels are the CPU's; elsewhere the layer saves memory only
            return nn.functional.linear(inputs, self._dequantized(inputs.dtype), self._bias_as(inputs.dtype))
        if self._packed is None:
            self._packed = self._pack()
        # 7 bits: without VNNI, x86 adds products of 8 and 8 bits in 16, which overflows. Everywhere, so that an
        # artifact answers the same on every machine.
        outputs: Tensor = torch.ops.quantized.linear_dynamic(inputs.float(), self._packed, reduce_range=True)
        return outputs.to(inputs.dtype)

    def _pack(self) -> Any:
        zero = torch.zeros(len(self.scale), dtype=torch.int64)
        with warnings.catch_warnings():  # quantised tensors are deprecated, and the only way to these kernels
            warnings.simplefilter("ignore")
            weight = torch._make_per_channel_quantized_tensor(self.weight, self.scale.double(), zero, 0)
        return torch.ops.quantized.linear_prepack(weight, self._bias_as(torch.float32))

    def _dequantized(self, dtype: torch.dtype) -> Tensor:
        return (self.weight * self.scale[:, None]).to(dtype)

    def _bias_as(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    # ---- what is packed is dropped whenever the buffers may have changed, and never copied

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Int8Linear:
        self._packed = None
        super()._apply(*args, **kwargs)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape
        return f"in_features={inputs}, out_features={outputs}, bias={self.bias is not None}"


def _matrix(layer: Any) -> Tensor:
    """A layer's weight as (outputs, inputs); GPT-2's Conv1D keeps it the other way round."""
    weight: Tensor = layer.weight
    return weight if isinstance(layer, nn.Linear) else weight.t()


def _bias(layer: Any) -> Tensor | None:
    bias: Tensor | None = layer.bias
    return bias
