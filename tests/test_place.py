"""A structure's tensors get their places: ties stay ties, module objects stay what they were."""

from __future__ import annotations

import torch
from torch import nn

from raytx.place import names, place


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def structure() -> Tied:
    with torch.device("meta"):
        return Tied()


def test_every_parameter_and_buffer_is_made_once_under_its_first_name() -> None:
    module, asked = structure(), []

    def made(name: str, meta: torch.Tensor) -> torch.Tensor:
        asked.append(name)
        value = torch.zeros(meta.shape, dtype=meta.dtype)
        return nn.Parameter(value) if isinstance(meta, nn.Parameter) else value

    place(module, made)
    assert sorted(asked) == sorted([*dict(module.named_parameters()), *dict(module.named_buffers())])
    assert not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])


def test_tied_parameters_stay_one() -> None:
    module = structure()
    place(module, lambda name, meta: nn.Parameter(torch.ones(meta.shape)) if meta.requires_grad else torch.ones(1))
    assert module.head.weight is module.embedding.weight


def test_module_objects_stay_so_that_what_refers_to_them_sees_the_new_tensors() -> None:
    module = structure()
    norm = module.norm
    place(module, lambda name, meta: nn.Parameter(torch.ones(meta.shape)) if meta.requires_grad else torch.ones(1))
    assert module.norm is norm
    assert not norm.running_mean.is_meta


def test_what_is_given_back_as_it_was_stays() -> None:
    module = structure()
    before = names(module)
    place(module, lambda name, meta: meta)
    assert names(module) == before
    assert all(parameter.is_meta for parameter in module.parameters())
