"""The engine's step and state, apart from any strategy: loss scaling, optimizers, what a checkpoint takes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from raytx.components import Microbatch
from raytx.errors import CheckpointError
from raytx.layout import Layout
from raytx.sections import Optim, Train
from raytx_torch.loss_scale import FACTOR, INTERVAL, LEAST, START, LossScale
from raytx_torch.whole import WholeStrategy

OPTIMIZERS = {
    "adamw": {"betas": (0.9, 0.99)},
    "momentum": {"type": "sgd", "momentum": 0.9},
    "plain": {"type": "sgd"},
    "adafactor": {"type": "adafactor"},
}


OVERFLOWING = 1e6
"""Weight of a microbatch whose gradients fp16 cannot hold, though its loss is finite."""


class Net(nn.Module):
    """Two layers, a saved buffer and an output with a loss."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x, labels):
        logits = self.second(torch.tanh(self.first(x - self.mean)))
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


def weights(name):
    with torch.device("meta"):
        shape = Net().state_dict()[name].shape
    return np.random.default_rng(len(name)).normal(size=shape).astype(np.float32)


def engine(precision="fp32", **optim):
    """Return an engine on one rank of the CPU. Plans refuse fp16 there; its arithmetic runs all the same."""
    with torch.device("meta"):
        net = Net()
    optim = Optim(**{"lr": 0.1, "weight_decay": 0.1, "max_grad_norm": 0.5} | optim)
    train, scaling = Train(precision=precision), SimpleNamespace(use_gpu=False)
    recipe = SimpleNamespace(optim=optim, train=train, scaling=scaling)
    plan = SimpleNamespace(layout=Layout(), world_size=1, recipe=recipe)
    return WholeStrategy().engine(net, model=None, weights=weights, plan=plan, rank=0)


def batch(number, *, weight=0.5):
    """Two microbatches of a step."""
    draw = np.random.default_rng(number)
    return [
        Microbatch({"x": draw.normal(size=(4, 6)).astype(np.float32), "labels": draw.integers(0, 3, 4)}, weight, 0)
        for _ in range(2)
    ]


def scaled(*, at=256.0):
    """Return an engine in fp16 at a scale that its gradients bear, those of a batch of OVERFLOWING weight excepted."""
    ours = engine("fp16")
    ours.load_scalars({"loss_scale": at, "clean_steps": 0, "skipped_steps": 0})
    return ours


def contents(engine):
    return {(name, part): np.copy(array) for name, part, array in engine.tensors()}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key], err_msg=str(key))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_goes_on_from_what_it_saved_to_the_same_bits(optimizer, precision):
    unbroken = engine(precision, **OPTIMIZERS[optimizer])
    for number in range(3):
        unbroken.train_batch(batch(number), lr=0.01)
    saved, scalars = contents(unbroken), unbroken.scalars()
    again = engine(precision, **OPTIMIZERS[optimizer])
    again.load_tensors(lambda name, part: saved[name, part], step=3)
    again.load_scalars(scalars)
    for number in range(3, 6):
        assert unbroken.train_batch(batch(number), lr=0.01) == again.train_batch(batch(number), lr=0.01)
    same(contents(unbroken), contents(again))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_looking_at_the_state_before_the_first_step_changes_nothing(optimizer):
    looked, plain = engine(**OPTIMIZERS[optimizer]), engine(**OPTIMIZERS[optimizer])
    before = contents(looked)
    np.testing.assert_array_equal(before["first.weight", "weight"], weights("first.weight"))
    assert all(not value.any() for (_, part), value in before.items() if part != "weight")
    looked.load_tensors(lambda name, part: before[name, part], step=0)
    assert looked.train_batch(batch(0), lr=0.01) == plain.train_batch(batch(0), lr=0.01)
    same(contents(looked), contents(plain))


def test_adafactor_keeps_a_row_and_a_column():
    found = contents(engine(type="adafactor"))
    assert found["first.weight", "row_var"].shape == (5, 1)
    assert found["first.weight", "col_var"].shape == (1, 6)
    assert found["first.bias", "variance"].shape == (5,)


def test_a_tensor_of_another_shape_is_refused_by_name():
    trained = engine()
    saved = contents(trained)
    saved["first.bias", "weight"] = np.zeros(1, dtype=np.float32)
    with pytest.raises(CheckpointError, match=r"first\.bias.*\(1,\).*\(5,\)"):
        trained.load_tensors(lambda name, part: saved[name, part], step=1)


def test_the_norm_is_that_before_clipping_and_the_update_that_after():
    ours = engine(type="sgd", max_grad_norm=0.01, weight_decay=0.0)
    before = contents(ours)
    told = ours.train_batch(batch(0), lr=1.0)
    moved = [contents(ours)[key] - value for key, value in before.items()]
    assert told["grad_norm"] > 0.1
    assert np.sqrt(sum(np.square(change).sum() for change in moved)) == pytest.approx(0.01, rel=1e-3)


def test_frozen_parameters_stay_and_are_not_saved():
    with torch.device("meta"):
        net = Net()
    net.first.requires_grad_(False)
    recipe = SimpleNamespace(optim=Optim(), train=Train(), scaling=SimpleNamespace(use_gpu=False))
    plan = SimpleNamespace(layout=Layout(), world_size=1, recipe=recipe)
    ours = WholeStrategy().engine(net, model=None, weights=weights, plan=plan, rank=0)
    ours.train_batch(batch(0), lr=0.1)
    np.testing.assert_array_equal(ours.module.first.weight, weights("first.weight"))
    assert {name for name, _ in contents(ours)} == {"second.weight", "second.bias", "mean"}


# ---- fp16


def test_an_overflow_updates_nothing_halves_the_scale_and_says_so():
    ours = scaled(at=256.0)
    assert ours.train_batch(batch(0), lr=0.01)["skipped"] == 0
    before = contents(ours)
    told = ours.train_batch(batch(1, weight=OVERFLOWING), lr=0.01)
    assert np.isfinite(told.pop("loss"))
    assert told == {"grad_norm": 0.0, "loss_scale": 256.0, "skipped": 1.0}
    same(contents(ours), before)
    assert ours.scalars()["loss_scale"] == 128.0


def test_the_scale_is_taken_out_of_norm_and_update():
    """Of the update by SGD: Adam's would be the same at any scale."""
    rough, plain = engine("fp16", type="sgd", max_grad_norm=None), engine(type="sgd", max_grad_norm=None)
    rough.load_scalars({"loss_scale": 256.0, "clean_steps": 0, "skipped_steps": 0})
    ours, theirs = rough.train_batch(batch(0), lr=0.1), plain.train_batch(batch(0), lr=0.1)
    assert ours["skipped"] == 0
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)
    for key, value in contents(plain).items():
        np.testing.assert_allclose(contents(rough)[key], value, atol=1e-3, err_msg=str(key))


def test_skipped_steps_are_none_of_the_optimizers():
    """Else Adam's correction for its first steps would be another after resuming."""
    unbroken = scaled()
    told = [unbroken.train_batch(batch(number, weight=w), lr=0.01) for number, w in enumerate([0.5, OVERFLOWING, 0.5])]
    assert [row["skipped"] for row in told] == [0, 1, 0]
    saved, scalars = contents(unbroken), unbroken.scalars()
    again = engine("fp16")
    again.load_tensors(lambda name, part: saved[name, part], step=3)
    again.load_scalars(scalars)
    assert unbroken.train_batch(batch(3), lr=0.01) == again.train_batch(batch(3), lr=0.01)
    same(contents(unbroken), contents(again))


def test_a_run_that_was_not_fp16_hands_over_no_scale():
    ours = engine("fp16")
    ours.load_scalars({})
    assert ours.scalars()["loss_scale"] == START
    assert engine().scalars() == {}


def test_the_scale_grows_after_enough_clean_steps():
    scale = LossScale()
    for _ in range(INTERVAL - 1):
        scale.judge(1.0)
    assert scale.value == START
    scale.judge(1.0)
    assert scale.value == START * FACTOR
    assert scale.clean == 0


def test_overflow_at_the_least_scale_is_divergence_and_no_longer_skipped():
    scale = LossScale()
    skipped = 0
    while scale.judge(float("inf"))["skipped"]:
        skipped += 1
    assert scale.value == LEAST
    assert skipped == scale.skipped == np.log2(START / LEAST)
