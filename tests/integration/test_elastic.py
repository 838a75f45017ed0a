"""An elastic run learns on fewer ranks, and on more again, what it would have learned without the change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from raytx.plan import resolve
from raytx.recipe import Recipe

STRATEGIES: list[dict[str, Any]] = [
    {"type": "ddp"},
    {"type": "fsdp"},
    {"type": "deepspeed", "stage": 2},
    {"type": "deepspeed-3d", "pipeline_parallel_size": 2},
]
STEPS, LIMIT = 9, 1e-5


@dataclass(frozen=True)
class Curves:
    """Losses by step: of an unbroken run, and of the one whose ranks went and came; and where the latter resumed."""

    unbroken: dict[int, float]
    elastic: dict[int, float]
    resumed: list[int]


@pytest.fixture(scope="module")
def curves(recipe: Callable[..., Recipe], run_ranks: Callable[..., Any]) -> dict[str, Curves]:
    """Each strategy without a break on four ranks, and to step 3 on four, to 6 on two, to the end on four."""
    schedule = {"train__steps": STEPS, "save__every": 3, "save__num_to_keep": None, "scaling__num_workers": [2, 4]}
    runs = [recipe(f"elastic-{strategy['type']}", strategy=strategy, **schedule) for strategy in STRATEGIES]
    parts = []
    for ranks, goes_on_from in ((4, 3), (2, 6), (4, STEPS)):
        parts.append(run_ranks(runs, on=ranks))
        for run in runs:
            _forget_after(goes_on_from, resolve(run).run_dir)
    return {
        strategy["type"]: Curves(
            losses(whole), losses(shrunk) | losses(grown), [*resumptions(shrunk), *resumptions(grown)]
        )
        for strategy, whole, shrunk, grown in zip(STRATEGIES, *parts, strict=True)
    }


def _forget_after(step: int, run_dir: Path) -> None:
    for path in (run_dir / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def losses(rows: list[dict[str, Any]]) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}


def resumptions(rows: list[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in rows if row["kind"] == "resumed"]


@pytest.mark.parametrize("strategy", [strategy["type"] for strategy in STRATEGIES])
def test_ranks_that_go_and_come_change_no_loss(curves: dict[str, Curves], strategy: str) -> None:
    found = curves[strategy]
    assert found.resumed == [3, 6]
    assert sorted(found.unbroken) == list(range(1, STEPS + 1))
    assert sorted(found.elastic) == list(range(4, STEPS + 1))
    for step, loss in found.elastic.items():
        assert loss == pytest.approx(found.unbroken[step], rel=LIMIT), f"step {step}"
