"""The starting weights of a model, each read or drawn when it is asked for: no rank holds more than its part."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from raytx.errors import RecipeError
from raytx_hf.architecture import expanded

if TYPE_CHECKING:
    from raytx_hf.model import HFModel

UNWRITTEN = -(2**62) - 7
"""Stands in whole-number tensors that no initialisation has written yet; NaN does in others."""


class Drawn:
    """Random weights: a function of seed and name, the same in whatever order and on whatever rank they are drawn.

    A tensor's module is given real memory for a moment, and transformers' own initialisation is run on it and then on
    the modules around it, which may overrule it (GPT-2 scales its residual projections that way). Where an architecture
    sets values in its constructor only, the whole model is built once on the CPU instead.
    """

    def __init__(self, module: PreTrainedModel, whole: Callable[[], PreTrainedModel], *, seed: int) -> None:
        self._module, self._build, self._seed = module, whole, seed
        self._owners = {
            f"{prefix}.{leaf}" if prefix else leaf: prefix
            for prefix, owner in module.named_modules()
            for leaf in (*owner._parameters, *owner._buffers)
        }

    def __call__(self, name: str) -> torch.Tensor:
        owner = self._owners[name]
        with _seeded(self._seed, owner), _real(self._module.get_submodule(owner)) as tensors, torch.no_grad():
            for module, initialise in self._initialisers(owner):
                initialise(module)
            value = tensors[name.rpartition(".")[2]]
        return self._whole[name] if _unwritten(value) else value

    def _initialisers(self, owner: str) -> Iterator[tuple[nn.Module, Callable[[nn.Module], None]]]:
        """Yield the module and those around it, innermost first, each with the initialisation that it falls under."""
        path = owner.split(".") if owner else []
        chain = [self._module.get_submodule(".".join(path[:depth])) for depth in range(len(path) + 1)]
        rules: list[Callable[[nn.Module], None]] = []
        for module in chain:
            rules.append(module._init_weights if isinstance(module, PreTrainedModel) else rules[-1])
        yield from reversed(list(zip(chain, rules, strict=True)))

    @cached_property
    def _whole(self) -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            built = self._build()
        return {**dict(built.named_parameters(remove_duplicate=False)), **dict(built.named_buffers())}


class Stored:
    """Pretrained weights in safetensors files, by the names that the files' own generation of transformers gave them.

    What the files do not hold, such as a new classifier, is drawn.
    """

    def __init__(self, model: HFModel, module: PreTrainedModel, drawn: Drawn) -> None:
        self._model, self._module, self._drawn = model, module, drawn
        self._wanted = module.state_dict()
        self._files = {key: file for file in _files(model) for key in _keys(file)}
        transforms = get_model_conversion_mapping(module)
        self._renamings = [step for step in transforms if isinstance(step, WeightRenaming)]
        self._converters = [step for step in transforms if isinstance(step, WeightConverter)]
        self._sources = self._arranged()
        self._aliases = _aliases(module)
        self._check()

    def __call__(self, name: str) -> torch.Tensor:
        for alias in self._aliases.get(name, [name]):
            if alias in self._sources:
                return self._shaped(name, self._read(alias))
        return self._drawn(name)

    def _arranged(self) -> dict[str, tuple[WeightConverter | None, list[tuple[str, str]]]]:
        """Return for each of the model's names how it is made: by which conversion, of which (pattern, key) pairs."""
        wanted = self._wanted
        by_pattern = {pattern: step for step in self._converters for pattern in step.source_patterns}
        found: dict[str, tuple[WeightConverter | None, list[tuple[str, str]]]] = {}
        for key in sorted(self._files, key=_natural):
            name, pattern = self._renamed(key, wanted)
            step = by_pattern[pattern] if pattern is not None else None
            for target in _targets(name, step):
                if target not in wanted:  # what files of older releases hold besides, such as position ids
                    continue
                found.setdefault(target, (step, []))[1].append((pattern or key, key))
        return found

    def _renamed(self, key: str, wanted: dict[str, Any]) -> tuple[str, str | None]:
        """Return the model's name for a file's key, and the pattern of the conversion it goes through, if it does."""
        prefix = self._module.base_model_prefix
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        return name, pattern

    def _read(self, name: str) -> torch.Tensor:
        step, pairs = self._sources[name]
        if step is None:
            return _tensor(self._files[pairs[0][1]], pairs[0][1])
        step = deepcopy(step)
        for pattern, key in pairs:
            step.add_tensor(name, key, pattern, _tensor(self._files[key], key))
        made = step.convert(name, model=self._module, config=self._module.config)
        value = made[name]
        return value[0] if isinstance(value, list) else value

    def _shaped(self, name: str, value: torch.Tensor) -> torch.Tensor:
        expected = self._wanted[name].shape
        if value.shape != expected:
            raise RecipeError(
                f"model.path={self._model.path}: {name} is {tuple(value.shape)} there, this task and config make it "
                f"{tuple(expected)}"
            )
        return value

    def _check(self) -> None:
        """A file of another architecture would otherwise be taken for one without any of the weights."""
        names = [name for name, _ in self._module.named_parameters()]
        missing = [n for n in names if not any(alias in self._sources for alias in self._aliases.get(n, [n]))]
        in_layers = any(part.isdigit() for name in missing for part in name.split("."))
        if in_layers or 2 * len(missing) > len(names):  # a new head is drawn, a layer that is not there is a mistake
            raise RecipeError(
                f"model.path={self._model.path}: its files lack {len(missing)} of {len(names)} weights of "
                f"{type(self._module).__name__}, {missing[0]!r} for one"
            )


class Adapted:
    """The weights of a module with adapters on: the base's under their own names, and the adapters' own, drawn."""

    def __init__(self, module: nn.Module, base: Callable[[str], torch.Tensor], *, seed: int) -> None:
        self._module, self._base, self._seed = module, base, seed

    def __call__(self, name: str) -> torch.Tensor:
        owner = _tuner(self._module, name)
        return self._base(_base_name(name)) if owner is None else self._draw(name, owner)

    def _draw(self, name: str, owner: str) -> torch.Tensor:
        layer = self._module.get_submodule(owner)
        (adapter,) = layer.active_adapters
        kinds = [part for kind in layer.adapter_layer_names if adapter in (part := getattr(layer, kind))]
        # A linear layer's are modules; an embedding's are parameters, which the dict around them owns.
        parts = [part[adapter] if isinstance(part, nn.ModuleDict) else part for part in kinds]
        with _seeded(self._seed, owner), _real(*parts), torch.no_grad():
            layer.reset_lora_parameters(adapter, True)
            return self._module.get_parameter(name).detach()


def reader(read: Callable[[str], torch.Tensor]) -> Callable[[str], np.ndarray]:
    """Return the reader that strategies are given: whole numpy arrays, fp32 for numbers that are not whole."""

    def as_array(name: str) -> np.ndarray:
        value = read(name).detach()
        return (value.float() if value.is_floating_point() else value).contiguous().numpy()

    return as_array


@contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        yield


@contextmanager
def _real(*modules: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Give the modules' own tensors memory on the CPU, with nothing written yet; take it away again."""
    kept = [(tensors, dict(tensors)) for module in modules for tensors in (module._parameters, module._buffers)]
    try:
        for tensors, before in kept:
            for leaf, tensor in before.items():
                if tensor is not None:
                    tensors[leaf] = _empty(tensor)
        yield {leaf: tensor for tensors, _ in kept for leaf, tensor in tensors.items()}
    finally:
        for tensors, before in kept:
            tensors.update(before)


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    unwritten: float | int | bool = float("nan") if tensor.is_floating_point() else UNWRITTEN
    if tensor.dtype not in (torch.int64, torch.float64, torch.float32, torch.float16, torch.bfloat16):
        unwritten = 0
    made = torch.full(tensor.shape, unwritten, dtype=tensor.dtype)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def _unwritten(value: torch.Tensor) -> bool:
    if value.dtype == torch.int64:
        return bool((value == UNWRITTEN).any())
    return not value.is_floating_point() or bool(value.isnan().any())


def _tuner(module: nn.Module, name: str) -> str | None:
    """Return the adapter layer whose own parameter this is, or None for one of the base model."""
    path = name.split(".")
    for depth in range(len(path) - 1, 0, -1):
        owner = ".".join(path[:depth])
        kinds = getattr(module.get_submodule(owner), "adapter_layer_names", None)
        if kinds is not None and hasattr(module.get_submodule(owner), "reset_lora_parameters"):
            return owner if path[depth] in kinds else None
    return None


def _base_name(name: str) -> str:
    """Return the plain model's name of a tensor that adapters have wrapped."""
    path = name.removeprefix("base_model.model.").split(".")
    if "modules_to_save" in path:
        place = path.index("modules_to_save")
        path = path[:place] + path[place + 2 :]
    return ".".join(part for part in path if part not in ("base_layer", "original_module"))


def _targets(name: str, step: WeightConverter | None) -> Sequence[str]:
    """One conversion may make several tensors; its first one's name is what a key is renamed to."""
    if step is None:
        return [name]
    return [name.replace(step.target_patterns[0], target) for target in step.target_patterns]


def _aliases(module: nn.Module) -> dict[str, list[str]]:
    """Return every name of each tied parameter: a file may hold it under any of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() for name in group}


def _natural(key: str) -> list[tuple[int, int, str]]:
    """Sort numbers in names by value: expert 10 comes after expert 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


def _keys(path: str) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _tensor(path: str, key: str) -> torch.Tensor:
    """Read one tensor. The file is closed at once: what was read of it would stay in this process's memory."""
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(key)
    return tensor


def _files(model: HFModel) -> list[str]:
    """Return the safetensors files of model.path, downloaded where it is a hub name; a pickle is never read."""
    assert model.path is not None
    place, revision = expanded(model.path), model.revision or "main"
    try:
        one = cached_file(place, SAFE_WEIGHTS_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
        if one is not None:
            return [one]
        index = cached_file(
            place, SAFE_WEIGHTS_INDEX_NAME, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        if index is not None:
            files, _ = get_checkpoint_shard_files(place, index, revision=revision)
            return list(files)
    except (OSError, ValueError) as error:
        raise RecipeError(f"model.path={model.path}: {' '.join(str(error).split())}") from None
    raise RecipeError(
        f"model.path={model.path}: no file named {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME} there; "
        "weights are read from safetensors only, as a pickle could run code"
    )
