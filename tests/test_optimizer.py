"""The optimizer: the one that was asked for, with the state that is told of it, on parameters grouped by decay."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest
import torch
from torch import nn

from raytx import optimizer
from raytx.optimizer import build, parameter_groups, refusal, state_bytes, state_parts, state_tensors, uncuttable
from raytx.recipe import Recipe, apply, parse
from raytx.sections import Optim

SHAPES = [(5,), (6, 4), (2, 3, 4), (4096,), (72, 64)]
OPTIMS = [
    Optim(),
    Optim(fused=False),
    Optim(type="sgd"),
    Optim(type="sgd", momentum=0.9, nesterov=True),
    Optim(type="adafactor"),
]
PLAIN: dict[str, Any] = {"name": "small", "model": {"type": "decoder"}, "data": {"type": "text-files"}}


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {str(shape): nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES}


def trained(optim: Optim, *, steps: int = 1, built: Any = None) -> tuple[dict[str, nn.Parameter], Any]:
    """Take steps down a bowl, whose gradient differs in every element and step."""
    held = parameters()
    groups = parameter_groups(held, weight_decay=optim.weight_decay)
    made = built(groups) if built else build(optim, groups, device_type="cpu")
    for _ in range(steps):
        for parameter in held.values():
            parameter.grad = parameter.detach() ** 3
        made.step()
    return held, made


def recipe(**changes: Any) -> Recipe:
    return parse(apply(PLAIN, {key.replace("__", "."): value for key, value in changes.items()}))


@pytest.mark.parametrize(
    ("optim", "wanted"),
    [
        (
            Optim(betas=(0.8, 0.95), eps=1e-6, lr=0.01),
            lambda groups: torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6),
        ),
        (
            Optim(type="sgd", momentum=0.9, nesterov=True, lr=0.01),
            lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
        ),
        (
            Optim(type="adafactor", beta2_decay=-0.7, eps=1e-6, lr=0.01),
            lambda groups: torch.optim.Adafactor(groups, lr=0.01, beta2_decay=-0.7, eps=(1e-6, 1e-3), d=1.0),
        ),
    ],
    ids=["adamw", "sgd", "adafactor"],
)
def test_a_recipe_trains_as_torch_does_with_the_same_settings(optim: Optim, wanted: Any) -> None:
    found, _ = trained(optim, steps=5)
    expected, _ = trained(optim, steps=5, built=wanted)
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-6, atol=1e-8)
        assert not torch.equal(parameter, parameters()[name])


@pytest.mark.parametrize("optim", OPTIMS, ids=str)
def test_the_state_told_of_a_parameter_is_the_state_that_torch_keeps(optim: Optim) -> None:
    held, made = trained(optim)
    for parameter in held.values():
        kept = {name: tensor for name, tensor in made.state[parameter].items() if name != "step"}
        told = state_tensors(optim, parameter.shape)
        assert set(state_parts(optim, parameter.shape)) == kept.keys()
        assert {name: tuple(tensor.shape) for name, tensor in kept.items()} == {n: t.shape for n, t in told.items()}
        assert {str(tensor.dtype) for tensor in kept.values()} <= {"torch.float32"}
        assert state_bytes(optim, parameter.shape) == sum(tensor.nbytes for tensor in kept.values())


@pytest.mark.parametrize("optim", OPTIMS, ids=str)
def test_state_made_of_zeros_starts_training_like_no_state(optim: Optim) -> None:
    def with_zeros(groups: list[dict[str, Any]]) -> Any:
        made = build(optim, groups, device_type="cpu")
        for parameter in (p for group in groups for p in group["params"]):
            told = state_tensors(optim, parameter.shape)
            made.state[parameter] = {"step": torch.tensor(0.0)} | {n: torch.zeros(t.shape) for n, t in told.items()}
        return made

    found, _ = trained(optim, steps=3, built=with_zeros)
    expected, _ = trained(optim, steps=3)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_adamw_is_fused_where_torch_can_and_the_numbers_agree_to_rounding() -> None:
    found, fused = trained(Optim(lr=0.01), steps=20)
    expected, plain = trained(Optim(lr=0.01, fused=False), steps=20)
    assert (fused.defaults["fused"], plain.defaults["fused"]) == (True, None)
    for name, parameter in found.items():
        assert (parameter - expected[name]).norm() < 1e-6 * expected[name].norm()


def test_nothing_is_fused_on_a_device_that_cannot() -> None:
    assert build(Optim(), [{"params": [nn.Parameter(torch.ones(2))]}], device_type="meta").defaults["fused"] is None


def test_matrices_decay_and_vectors_do_not() -> None:
    held = {"scale": nn.Parameter(torch.ones(3)), "weight": nn.Parameter(torch.ones(3, 2))}
    decaying, still = parameter_groups(held, weight_decay=0.1)
    assert (decaying["weight_decay"], still["weight_decay"]) == (0.1, 0.0)
    assert decaying["params"][0] is held["weight"]
    assert still["params"][0] is held["scale"]


def test_a_group_without_parameters_is_left_out() -> None:
    assert len(parameter_groups({"scale": nn.Parameter(torch.ones(3))}, weight_decay=0.1)) == 1


def test_building_leaves_the_groups_as_they_were() -> None:
    groups = parameter_groups(parameters(), weight_decay=0.1)
    build(Optim(), groups, device_type="cpu")
    assert all(group.keys() == {"params", "weight_decay"} for group in groups)


@pytest.mark.parametrize("type_", ["adafactor", "adamw_8bit"])
def test_an_optimizer_that_looks_at_whole_parameters_may_not_be_cut(type_: Any) -> None:
    told = uncuttable(Optim(type=type_))
    assert told is not None
    assert told.startswith(f"optim.type={type_} scales")
    assert told.endswith("such as ddp")


@pytest.mark.parametrize(
    "optim", [Optim(lr=0.1), Optim(type="sgd", momentum=0.9, lr=0.1)], ids=lambda optim: optim.type
)
def test_an_optimizer_that_may_be_cut_does_the_same_to_the_halves_of_a_parameter(optim: Optim) -> None:
    assert uncuttable(optim) is None
    values = torch.linspace(-1, 1, 60).reshape(6, 10)
    full, halves = nn.Parameter(values.clone()), [nn.Parameter(part.clone()) for part in values.chunk(2)]
    for held in ([full], halves):
        made = build(optim, [{"params": held}], device_type="cpu")
        for _ in range(3):
            for parameter in held:
                parameter.grad = parameter.detach() ** 3
            made.step()
    torch.testing.assert_close(torch.cat([half.detach() for half in halves]), full.detach(), rtol=1e-6, atol=1e-7)


def test_fp16_is_refused_without_a_gpu_and_taken_with_one() -> None:
    assert refusal(recipe(train__precision="fp16")) == (
        "train.precision=fp16 needs scaling.use_gpu=true; on CPU use bf16 or fp32"
    )
    assert refusal(recipe(train__precision="fp16", scaling__use_gpu=True)) is None
    assert refusal(recipe(train__precision="bf16")) is None


@pytest.mark.parametrize(("version", "found"), [(None, "none is"), ("0.49.2", "0.49.2 is")])
def test_8_bit_moments_are_refused_without_a_bitsandbytes_that_has_them(
    version: str | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer.metadata, "version", _versions(version))
    told = refusal(recipe(optim__type="adamw_8bit"))
    assert told is not None
    assert f"needs bitsandbytes 0.50 or newer, {found} installed: pip install -U bitsandbytes" in told


@pytest.mark.parametrize("version", ["0.50.2", "0.50rc1", "1.0.0.dev0"])
def test_8_bit_moments_are_taken_with_a_bitsandbytes_that_has_them(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer.metadata, "version", _versions(version))
    assert refusal(recipe(optim__type="adamw_8bit")) is None


def _versions(version: str | None) -> Any:
    def answer(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    return answer


def test_8_bit_moments_keep_what_is_told_of_them_and_go_as_far_as_adamw() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    optim = Optim(type="adamw_8bit", lr=0.01)
    held, made = trained(optim, steps=5)
    full, _ = trained(Optim(lr=0.01), steps=5)
    for name, parameter in held.items():
        kept = {part: value for part, value in made.state[parameter].items() if part != "step"}
        told = state_tensors(optim, parameter.shape)
        assert {part: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for part, v in kept.items()} == told
        start, wanted, found = (float((p.detach() ** 4).sum()) for p in (parameters()[name], full[name], parameter))
        assert start - found == pytest.approx(start - wanted, rel=0.01 if "qmap1" in told else 1e-5)
