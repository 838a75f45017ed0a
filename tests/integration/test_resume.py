"""Nothing is lost: a run continues to the same weights, also under another strategy or on other ranks."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from raytx import pulse
from raytx.checkpoint import Checkpoint
from raytx.plan import resolve

TWO_RANKS = [{"type": "ddp"}, *({"type": "deepspeed", "stage": stage} for stage in range(4))]
SCHEDULE = {"train__steps": 8, "save__every": 4, "save__num_to_keep": None}


def label(strategy):
    return "-".join(str(value) for value in strategy.values())


def directory(recipe, step):
    return resolve(recipe).run_dir / "checkpoints" / f"step-{step:08d}"


def contents(path):
    """Return every tensor of a checkpoint, weights and moments."""
    checkpoint = Checkpoint(path)
    checkpoint._open()
    return {key: file.get_tensor(key) for key, file in checkpoint._places.items()}


def losses(rows):
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}


def forget_last(recipe, keep_as=None):
    """Put a finished run back to where it was after step 4; keep its end elsewhere."""
    last = directory(recipe, 8)
    if keep_as:
        shutil.copytree(last, keep_as)
    shutil.rmtree(last)


@pytest.fixture(scope="module")
def unbroken(recipe, run_ranks):
    """Every strategy trained without a break on two ranks."""
    recipes = [recipe(f"resume-{label(s)}", strategy=s, scaling__num_workers=2, **SCHEDULE) for s in TWO_RANKS]
    return dict(zip(map(label, TWO_RANKS), zip(recipes, run_ranks(recipes), strict=True), strict=True))


@pytest.fixture(scope="module")
def resumed(unbroken, run_ranks, tmp_path_factory):
    """The same runs, put back to step 4 and continued by new processes."""
    kept = tmp_path_factory.mktemp("unbroken")
    for name, (recipe, _) in unbroken.items():
        forget_last(recipe, keep_as=kept / name)
    rows = run_ranks([recipe for recipe, _ in unbroken.values()])
    return {name: (kept / name, row) for name, row in zip(unbroken, rows, strict=True)}


@pytest.mark.parametrize("strategy", map(label, TWO_RANKS))
def test_a_continued_run_ends_in_the_same_bits(unbroken, resumed, strategy):
    recipe, _ = unbroken[strategy]
    expected, rows = resumed[strategy]
    assert [row["step"] for row in rows if row["kind"] == "resumed"] == [4]
    before, after = contents(expected), contents(directory(recipe, 8))
    assert before.keys() == after.keys()
    assert any("|exp_avg_sq" in key for key in before)
    for key, value in before.items():
        np.testing.assert_array_equal(value, after[key], err_msg=key)


def test_every_strategy_writes_the_same_tensors(unbroken, resumed):
    shapes = [
        {key: value.shape for key, value in contents(directory(recipe, 8)).items()} for recipe, _ in unbroken.values()
    ]
    assert all(other == shapes[0] for other in shapes)


@pytest.mark.parametrize(
    ("saved", "continued", "workers"),
    [
        ("deepspeed-2", {"type": "ddp"}, 3),
        ("ddp", {"type": "deepspeed", "stage": 3}, 2),
        ("deepspeed-3", {"type": "single"}, 1),
        ("deepspeed-0", {"type": "deepspeed", "stage": 1}, 4),
    ],
)
def test_a_run_continues_under_another_strategy_and_on_other_ranks(
    unbroken, resumed, recipe, run_ranks, storage, saved, continued, workers
):
    source, rows = unbroken[saved]
    name = f"moved-{saved}-{label(continued)}-{workers}"
    sizes = {"train__global_batch_size": 12, "train__micro_batch_size": 1} if workers == 3 else {}
    target = recipe(name, strategy=continued, scaling__num_workers=workers, **SCHEDULE)
    if sizes:  # three ranks divide a batch of twelve: the unbroken curve is taken anew
        other = recipe(
            f"{name}-source", strategy={"type": "deepspeed", "stage": 2}, scaling__num_workers=2, **SCHEDULE, **sizes
        )
        (rows,) = run_ranks([other])
        source, target = other, recipe(name, strategy=continued, scaling__num_workers=3, **SCHEDULE, **sizes)
    shutil.copytree(directory(source, 4), directory(target, 4))
    (continued_rows,) = run_ranks([target])
    expected, measured = losses(rows), losses(continued_rows)
    assert sorted(measured) == [5, 6, 7, 8]
    for step, value in measured.items():
        assert value == pytest.approx(expected[step], rel=1e-5)


def test_a_damaged_checkpoint_is_passed_over_by_every_rank_and_named(recipe, run_ranks):
    run = recipe("damaged", strategy={"type": "ddp"}, scaling__num_workers=2, **SCHEDULE)
    run_ranks([run])
    weights = next(directory(run, 8).glob("weights-*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    (rows,) = run_ranks([run])
    assert [row["step"] for row in rows if row["kind"] == "resumed"] == [4]
    remarks = [row["text"] for row in rows if row["kind"] == "remark"]
    (remark,) = [text for text in remarks if "SHA-256" in text]  # a slow disk has remarks of its own
    assert weights.name in remark


def test_a_continued_run_says_where_it_is_before_it_has_done_a_step(recipe, train_here, tmp_path, monkeypatch):
    run = recipe("continued", train__steps=5)
    train_here(run)
    monkeypatch.setattr(pulse, "_pen", None)
    pulse.begin(tmp_path / "pulse")
    state, rows = train_here(run)
    assert (state.step, losses(rows)) == (5, {}), "it does no step"
    assert pulse.read(tmp_path / "pulse").step == 5
