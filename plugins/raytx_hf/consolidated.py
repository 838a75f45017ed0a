"""The tensors of a Hugging Face or peft directory, each made from a checkpoint when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, apply_converters, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from raytx.components import TensorGroup, TensorHeader, Weights
from raytx.errors import CheckpointError, RecipeError
from raytx.tasks.base import Task

SPELLED = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names of torch's types."""
Read = Callable[[torch.Tensor], torch.Tensor]
"""Returns the numbers of a tensor on the meta device."""


def whole(
    module: Any, tensors: Mapping[str, np.ndarray], weights: Weights, directory: Path, *, task: Task, dtype: str
) -> list[TensorGroup]:
    """Write the configs of a structure and return its tensors as `save_pretrained` would name them, adapters merged."""
    module = deepcopy(module)  # `weights` goes on reading the structure it was made for
    source = Source(module, tensors, weights)
    plain = module.unload() if hasattr(module, "unload") else module
    groups = _groups(plain, source.merged, getattr(torch, dtype))
    plain.config.use_cache = True
    if task.protocol == "openai":
        plain.generation_config.eos_token_id = task.tokenizer.eos_token_id
        plain.generation_config.pad_token_id = task.tokenizer.pad_token_id
    plain.to(getattr(torch, dtype)).save_pretrained(directory, state_dict={})
    return groups


def adapter(
    module: Any, tensors: Mapping[str, np.ndarray], weights: Weights, directory: Path, *, base: str | None, dtype: str
) -> list[TensorGroup]:
    """Write the config of a structure's adapter and return its tensors as peft would name them."""
    if not hasattr(module, "peft_config"):
        raise RecipeError("adapter_only: the model was trained without an adapter; leave it out to get all its weights")
    from peft import get_peft_model_state_dict

    (config,) = (deepcopy(one) for one in module.peft_config.values())
    config.inference_mode = True
    config.base_model_name_or_path = base
    config.save_pretrained(directory)
    source = Source(module, tensors, weights)
    # Frozen embeddings, which peft would look up on the hub to compare, come with the base.
    state = get_peft_model_state_dict(module, module.state_dict(keep_vars=True), save_embedding_layers=False)
    return [_group({name: tensor}, dict, source.read, getattr(torch, dtype)) for name, tensor in state.items()]


class Source:
    """The numbers behind the tensors of a structure: the checkpoint's where it was trained, else its starting weights.

    Tensors are known by identity, which outlives the unwrapping of adapters and does not tell tied ones apart.
    """

    def __init__(self, module: nn.Module, tensors: Mapping[str, np.ndarray], weights: Weights) -> None:
        self._tensors, self._weights = tensors, weights
        self._names: dict[int, str] = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            self._names.setdefault(id(tensor), name)
        self._layers = _adapted(module)
        self._check(module)

    def merged(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the plain model, with what its adapters add; peft itself merges, layer by layer."""
        value = self.read(tensor)
        for layer in self._layers.get(id(tensor), ()):
            parts = layer.state_dict(keep_vars=True)
            numbers = {leaf: value if part is tensor else self.read(part) for leaf, part in parts.items()}
            value = _merged(layer, numbers, _leaf(layer, tensor))
        return value

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        name = self._names[id(tensor)]
        array = self._tensors[name] if name in self._tensors else self._weights(name)
        if array.shape != tensor.shape:
            raise CheckpointError(f"{name!r} is {array.shape} in the checkpoint, {tuple(tensor.shape)} in the model")
        return torch.from_numpy(np.require(array, requirements="W"))

    def _check(self, module: nn.Module) -> None:
        """A trained tensor that is missing must not come from the starting weights, and none may be left over."""
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        if missing := sorted(trained - self._tensors.keys()):
            raise CheckpointError(f"the checkpoint lacks {len(missing)} trained parameters, {missing[0]!r} for one")
        if unknown := sorted(self._tensors.keys() - set(self._names.values())):
            raise CheckpointError(f"the model has no {unknown[0]!r}, one of {len(unknown)} such in the checkpoint")


def _adapted(module: nn.Module) -> dict[int, list[Any]]:
    """Return the adapter layers around each tensor of the base; a tied one may have several."""
    if not hasattr(module, "peft_config"):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[int, list[Any]] = {}
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            for tensor in layer.get_base_layer().state_dict(keep_vars=True).values():
                found.setdefault(id(tensor), []).append(layer)
    return found


def _leaf(layer: Any, tensor: torch.Tensor) -> str:
    state = layer.get_base_layer().state_dict(keep_vars=True)
    return next(leaf for leaf, part in state.items() if part is tensor)


def _merged(layer: Any, numbers: dict[str, torch.Tensor], leaf: str) -> torch.Tensor:
    """Return one tensor of an adapter layer's base after merging; a merge that gives NaN is an error, not a model."""
    made = deepcopy(layer)
    with torch.no_grad():
        made.load_state_dict(numbers, assign=True)
        made.merge(safe_merge=True)
        value: torch.Tensor = made.get_base_layer().state_dict()[leaf]
    return value


def _groups(plain: PreTrainedModel, read: Read, dtype: torch.dtype) -> list[TensorGroup]:
    """Return a module's tensors in groups that turn into the names and shapes of its public files together.

    transformers holds some layers otherwise than their files do, all experts in one tensor for instance.
    """
    conversions = get_model_conversion_mapping(plain, add_legacy=False)
    plain._weight_conversions = [one for one in conversions if not isinstance(one, PrefixChange)]
    reverse = [one.reverse_transform() for one in plain._weight_conversions[::-1]]
    converters = [one for one in reverse if isinstance(one, WeightConverter)]
    together: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in _written(plain).items():
        together.setdefault(apply_converters(name, converters)[0], {})[name] = tensor
    convert = partial(revert_weight_conversion, plain)
    return [_group(tensors, convert, read, dtype) for tensors in together.values()]


def _written(plain: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the tensors that are written, tied ones under the name that loading expects."""
    ignored = plain._keys_to_ignore_on_save or ()
    state = {name: tensor for name, tensor in plain.state_dict(keep_vars=True).items() if name not in ignored}
    kept = remove_tied_weights_from_state_dict(dict(state), plain)
    return {name: state[name] for name in kept}


def _group(
    tensors: dict[str, torch.Tensor],
    convert: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]],
    read: Read,
    dtype: torch.dtype,
) -> TensorGroup:
    """Return tensors on the meta device as a group, its headers found by converting them as they are."""

    def stored(value: torch.Tensor) -> torch.Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    def make() -> Iterator[tuple[str, np.ndarray]]:
        converted = dict(convert({name: read(tensor) for name, tensor in tensors.items()}))
        for name in list(converted):
            yield name, _array(stored(converted.pop(name)))

    made = convert({name: tensor.detach() for name, tensor in tensors.items()})
    headers = {name: TensorHeader(SPELLED[stored(one).dtype], tuple(one.shape)) for name, one in made.items()}
    return TensorGroup(headers, make)


def _array(value: torch.Tensor) -> np.ndarray:
    value = value.detach().contiguous()
    return (value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy()
