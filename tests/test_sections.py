"""The recipe's own sections: which numbers they refuse, and which they take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from raytx import cli
from raytx.errors import RecipeError
from raytx.recipe import Recipe, apply, parse, parse_overrides

PLAIN: dict[str, Any] = {"name": "small", "model": {"type": "decoder"}, "data": {"type": "text-files"}}
SPACE = {"optim.lr": {"loguniform": [1e-5, 1e-3]}}
INF, NAN = float("inf"), float("nan")


def changed(changes: dict[str, Any]) -> Recipe:
    return parse(apply(PLAIN, changes))


@pytest.mark.parametrize("value", [INF, NAN, -INF])
@pytest.mark.parametrize(
    "path",
    [
        "train.epochs",
        "optim.lr",
        "optim.weight_decay",
        "optim.eps",
        "optim.warmup",
        "optim.max_grad_norm",
        "scaling.wait_s",
        "scaling.resources_per_worker.memory",
        "serving.timeout_s",
        "strategy.bucket_cap_mb",
    ],
)
def test_a_number_that_is_not_finite_is_refused_in_every_section_and_in_components(path: str, value: float) -> None:
    with pytest.raises(RecipeError, match=r"1 mistake\n .*should be a finite number, not -?(inf|nan)"):
        changed({"strategy.type": "ddp", path: value})


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("train.seed", -1, "train.seed: input should be greater than or equal to 0, not -1"),
        ("train.seed", 2**32, "train.seed: input should be less than 4294967296"),
        ("train.epochs", 1e7, "train.epochs: input should be less than or equal to 1000000"),
        ("train.steps", 10**9, "train.steps: input should be less than 1000000000"),
        (
            "optim.warmup",
            1.5,
            "optim.warmup: must be a share of all steps below 1, or a whole number of steps, not 1.5",
        ),
    ],
)
def test_a_number_out_of_bounds_is_refused_with_the_bound(path: str, value: float, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        changed({path: value})
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("train.seed", 2**32 - 1),
        ("train.epochs", 1e6),
        ("optim.warmup", 0.5),
        ("optim.warmup", 1),
        ("optim.warmup", 30),
    ],
)
def test_a_number_at_its_bound_is_taken(path: str, value: float) -> None:
    section, name = path.split(".")
    assert getattr(getattr(changed({path: value}), section), name) == value


@pytest.mark.parametrize("amount", ["warmup", "decay"])
def test_part_of_a_step_is_refused(amount: str) -> None:
    with pytest.raises(RecipeError, match=f"optim.{amount}: must be a share of all steps below 1, or a whole number"):
        changed({"optim": {"schedule": "wsd", amount: 2.5}})


@pytest.mark.parametrize(
    ("idle", "told"),
    [
        ({"type": "sgd", "betas": [0.8, 0.9]}, "betas would do nothing: type sgd does not read it, only adamw or"),
        ({"type": "adafactor", "betas": [0.8, 0.9]}, "betas would do nothing: type adafactor does not read it"),
        ({"type": "sgd", "eps": 1e-6}, "eps would do nothing: type sgd"),
        ({"momentum": 0.9}, "momentum would do nothing: type adamw does not read it, only sgd"),
        ({"nesterov": True}, "nesterov would do nothing: type adamw"),
        ({"beta2_decay": -0.5}, "beta2_decay would do nothing: type adamw does not read it, only adafactor"),
        ({"type": "adafactor", "fused": True}, "fused would do nothing: type adafactor does not read it, only adamw"),
        ({"type": "sgd", "fused": False}, "fused would do nothing: type sgd"),
        ({"type": "adamw_8bit", "fused": False}, "fused would do nothing: type adamw_8bit"),
        ({"schedule": "constant", "min_lr_ratio": 0.1}, "min_lr_ratio would do nothing: schedule constant"),
        ({"schedule": "inverse_sqrt", "min_lr_ratio": 0.1}, "min_lr_ratio would do nothing: schedule inverse_sqrt"),
        ({"schedule": "cosine", "decay": 0.2}, "decay would do nothing: schedule cosine does not read it, only wsd"),
    ],
)
def test_a_setting_that_the_optimizer_or_the_schedule_ignores_is_refused(idle: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        changed({"optim": idle})
    assert f"optim: {told}" in str(caught.value)


@pytest.mark.parametrize(
    "optim",
    [
        {"betas": [0.8, 0.9], "eps": 1e-6, "fused": True, "schedule": "cosine", "min_lr_ratio": 0.1},
        {"type": "sgd", "momentum": 0.9, "nesterov": True, "schedule": "wsd", "decay": 0.2},
        {"type": "adafactor", "eps": 1e-6, "beta2_decay": -0.5, "schedule": "inverse_sqrt", "warmup": 10},
        {"type": "adamw_8bit", "betas": [0.8, 0.9], "schedule": "constant"},
    ],
    ids=lambda optim: optim.get("type", "adamw"),
)
def test_what_an_optimizer_and_a_schedule_read_is_taken_and_survives_being_dumped(optim: dict[str, Any]) -> None:
    recipe = changed({"optim": optim})
    assert parse(recipe.dump()) == recipe


def test_nesterov_needs_a_momentum() -> None:
    with pytest.raises(RecipeError, match="optim: nesterov looks ahead along the momentum, which is 0"):
        changed({"optim": {"type": "sgd", "nesterov": True}})


def test_a_warm_up_and_a_decay_of_more_than_all_steps_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"optim: warmup=0\.6 and decay=0\.5 are more than all steps together"):
        changed({"optim": {"schedule": "wsd", "warmup": 0.6, "decay": 0.5}})
    changed({"optim": {"schedule": "wsd", "warmup": 0.5, "decay": 0.5}})
    changed({"optim": {"warmup": 0.95}})


@pytest.mark.parametrize("idle", [{"grace_period": 2}, {"reduction_factor": 4}])
def test_settings_of_asha_are_refused_under_fifo(idle: dict[str, int]) -> None:
    search = {"space": SPACE, "scheduler": "fifo", **idle}
    with pytest.raises(RecipeError, match=f"search: {next(iter(idle))} would do nothing: scheduler fifo"):
        changed({"search": search})
    assert changed({"search": search | {"scheduler": "asha"}}).search is not None


def test_a_search_under_fifo_survives_being_dumped_whole() -> None:
    recipe = changed({"search": {"space": SPACE, "scheduler": "fifo"}})
    assert parse(recipe.dump()) == recipe


def test_endless_epochs_end_the_command_line_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: small\nmodel: {type: decoder}\ndata: {type: text-files}\n")
    monkeypatch.setattr(sys, "argv", ["raytx", "plan", str(path), "train.epochs=.inf"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err == f"error {path}: 1 mistake\n  train.epochs: input should be a finite number, not inf\n"


# ---- a number of workers, or a range of them


@pytest.mark.parametrize("given", [1, 10_000, [1, 1], [2, 4], (2, 4)], ids=str)
def test_workers_are_a_number_or_a_range(given: Any) -> None:
    scaling = changed({"scaling.num_workers": given}).scaling
    bounds = (given, given) if isinstance(given, int) else tuple(given)
    assert (scaling.min_workers, scaling.max_workers) == bounds
    assert scaling.elastic == (not isinstance(given, int))


def test_a_range_of_workers_can_be_given_on_the_command_line_and_survives_a_dump() -> None:
    recipe = changed(parse_overrides(["scaling.num_workers=[2, 4]"]))
    assert recipe.scaling.num_workers == (2, 4)
    assert parse(recipe.dump()) == recipe
    assert "num_workers:\n  - 2\n  - 4" in recipe.to_yaml()


@pytest.mark.parametrize(
    "given",
    [[4, 2], [0, 2], [1, 2, 3], [2], [], [1, 2.5], [True, 2], [1, 10_001], ["a", "b"], 0, -1, 2.5, "many", True, None],
    ids=str,
)
def test_any_other_number_of_workers_is_refused_with_what_is_allowed(given: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        changed({"scaling.num_workers": given})
    told = f"scaling.num_workers: must be a whole number from 1 to 10000, or two as [min, max], not {given!r}"
    assert str(caught.value).splitlines() == ["recipe: 1 mistake", f"  {told}"]
