"""Give the tensors of a module that is only a structure their places and values, one at a time, ties kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def place(module: Any, made: Callable[[str, Any], Any]) -> None:
    """Replace every parameter and buffer of a torch module by what `made(name, tensor)` returns for it.

    A tensor that several modules share is made once, under the first of its names, and is shared again. The module
    objects stay, so whatever refers to them sees the new tensors. `made` may return the tensor it was given.
    """
    done: dict[int, tuple[Any, Any]] = {}  # the old tensor is kept alive beside the new one: ids are told apart by it
    for prefix, owner in module.named_modules():
        for tensors in (owner._parameters, owner._buffers):
            for leaf, tensor in list(tensors.items()):
                if tensor is not None:
                    name = f"{prefix}.{leaf}" if prefix else leaf
                    if id(tensor) not in done:
                        done[id(tensor)] = (tensor, made(name, tensor))
                    tensors[leaf] = done[id(tensor)][1]


def names(module: Any) -> Mapping[int, str]:
    """Return the first name of each parameter and buffer of a module, by the tensor's id."""
    found: dict[int, str] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        found.setdefault(id(tensor), name)
    return found
