"""What FSDP shards, and what a rank holds of it. Its numbers are in tests/integration/test_fsdp.py."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from raytx.errors import RecipeError
from raytx.layout import Layout
from raytx.sections import Optim, Train
from raytx_torch.fsdp import layers
from raytx_torch.parts import local
from raytx_torch.strategies import FSDP

RANKS, RANK = 4, 1
WIDTH, DEPTH = 8, 3


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, hidden):
        return sum(expert(hidden) for expert in self.experts)


class Tower(nn.Module):
    """Layers between an embedding and a head that share their weight, a fixed buffer and a saved one."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("angles", torch.zeros(3), persistent=False)
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))

    def forward(self, ids):
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


@pytest.fixture
def tower():
    with torch.device("meta"):
        return Tower()


@pytest.fixture
def ranks():
    """Rank 1 of 4, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    yield
    dist.destroy_process_group()


def values(module):
    """Every tensor of a structure counted through, each number once."""
    start, found = 0, {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        dtype = np.float32 if tensor.is_floating_point() else np.int64
        found[name] = np.arange(start, start + tensor.numel(), dtype=dtype).reshape(tensor.shape)
        start += tensor.numel()
    return found


def plan():
    recipe = SimpleNamespace(optim=Optim(), train=Train(), scaling=SimpleNamespace(use_gpu=False))
    return SimpleNamespace(layout=Layout(data_parallel_size=RANKS), world_size=RANKS, recipe=recipe)


def engine(tower, weights, **fields):
    return FSDP(**fields).build().engine(tower, model=None, weights=weights, plan=plan(), rank=RANK)


def test_a_layer_is_a_unit_and_its_own_lists_are_not(tower):
    assert layers(tower) == list(tower.layers)


def test_layers_that_share_a_parameter_or_are_used_twice_are_no_units(tower):
    tower.layers[0].experts[0].weight = tower.head.weight
    tower.layers[2] = tower.layers[1]
    assert layers(tower) == []


def test_lists_of_lists_are_looked_into():
    nested = nn.Sequential(nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleDict({"a": nn.Linear(2, 2)})]))
    assert layers(nested) == [nested[0][0][0]], "a dictionary's entries are no sequence of layers"


@pytest.mark.parametrize(("replicas", "shards"), [(1, 4), (2, 2), (4, 1)])
def test_a_rank_holds_its_slice_of_every_parameter(ranks, tower, replicas, shards):
    expected = values(tower)
    sharded = dict(engine(tower, values(tower).__getitem__, replicas=replicas).module.named_parameters())
    assert sharded.keys() == expected.keys() - {"angles", "seen"}
    for name, parameter in sharded.items():
        length = -(-len(expected[name]) // shards)
        start = RANK % shards * length
        np.testing.assert_array_equal(local(parameter.detach()), expected[name][start : start + length], err_msg=name)


def test_ties_buffers_and_what_is_frozen_stay(ranks, tower):
    tower.layers[1].experts[0].weight.requires_grad_(False)
    expected = values(tower)
    module = engine(tower, expected.__getitem__).module
    assert module.head.weight is module.embedding.weight
    assert not module.layers[1].experts[0].weight.requires_grad
    assert module.layers[1].experts[0].bias.requires_grad
    np.testing.assert_array_equal(module.angles, expected["angles"])
    np.testing.assert_array_equal(module.seen, expected["seen"])


def test_whole_tensors_are_held_one_at_a_time(ranks, tower):
    shapes, read, most = values(tower), [], 0

    class Tracked(np.ndarray):
        """Plain arrays take no weak references."""

    def weights(name):
        nonlocal most
        gc.collect()
        most = max(most, sum(reference() is not None for reference in read))
        value = shapes[name].copy().view(Tracked)
        read.append(weakref.ref(value))
        return value

    engine(tower, weights)
    assert len(read) == len(shapes)
    assert most == 0, "all that was read before must be gone"


def test_a_parameter_without_dimensions_is_refused_by_name(ranks, tower):
    tower.temperature = nn.Parameter(torch.empty((), device="meta"))
    with pytest.raises(RecipeError, match=r"temperature is a single number.*ddp"):
        engine(tower, values(tower).__getitem__)


def test_replicas_must_divide_the_workers():
    with pytest.raises(RecipeError, match=r"replicas=3 .*num_workers=4; use one of 1, 2, 4"):
        FSDP(replicas=3).layout(RANKS)


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw_8bit"])
def test_optimizers_that_look_at_whole_parameters_are_refused(optimizer):
    recipe = SimpleNamespace(optim=Optim(type=optimizer))
    assert "ddp" in FSDP().refusal(recipe)
    assert FSDP().refusal(SimpleNamespace(optim=Optim(type="sgd"))) is None


def test_memory_is_divided_over_the_ranks_of_a_replica():
    layout = FSDP(replicas=2).layout(8)
    shares = FSDP(replicas=2, reduce_each_microbatch=True).shares(layout)
    assert (shares.parameters, shares.gradients, shares.optimizer, shares.activations) == (4, 4, 4, 1)
    assert FSDP(replicas=2).shares(layout).gradients == 1, "while microbatches accumulate, they are whole"
