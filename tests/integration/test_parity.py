"""The numbers do not depend on the machines: loss and gradient norm of every strategy, held to one process."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import parity_matrix as matrix
import pytest

from raytx.errors import RecipeError
from raytx.plan import resolve

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]  # the first test waits for all the training

LIMIT = 1e-5
"""Relative, per step, in fp32: rounding of sums in another order, carried through twenty updates."""
RECORD = "RAYTX_RECORD_PARITY"
"""Names the file that the measured differences are written to; docs/strategies.md is made of it."""


def steps(rows):
    failures = [row["traceback"] for row in rows if row["kind"] == "failed"]
    assert not failures, failures[0]
    return [row for row in rows if row["kind"] == "step"]


def furthest(rows, reference, key):
    pairs = list(zip(steps(rows), steps(reference), strict=True))
    assert len(pairs) == 20
    return max(abs(ours[key] - theirs[key]) / abs(theirs[key]) for ours, theirs in pairs)


def name_of(family, case=None):
    return re.sub("[^a-zA-Z0-9]+", "-", f"{family.name} {case.label if case else 'one'}").strip("-")


@pytest.fixture(scope="module")
def made(recipe, labelled):
    """Make the recipe of a family, alone or under a case."""

    def make(family, case=None):
        values = matrix.values(family, case)
        if "data" in values:
            values["data"] = {**values["data"], "path": str(labelled)}
        return recipe(name_of(family, case)).override(values)

    return make


@pytest.fixture(scope="module")
def references(made, run_workers):
    """Every family in one process, accumulating four microbatches a step, clipping most of the time."""
    found = run_workers([made(family) for family in matrix.FAMILIES])
    return {family.name: rows for family, rows in zip(matrix.FAMILIES, found, strict=True)}


@pytest.fixture(scope="module")
def refused(made):
    """The pairs that the plan refuses, with the reason."""
    reasons = {}
    for family, case in matrix.tried():
        try:
            resolve(made(family, case))
        except RecipeError as error:
            reasons[family.name, case.label] = str(error)
    return reasons


@pytest.fixture(scope="module")
def curves(request, made, run_workers, refused):
    """Every pair that is asked for and that the plan lets pass, trained by Ray workers: a group for each world size."""
    asked = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    chosen = {(of["family"].name, of["case"].label) for of in asked if "case" in of and "family" in of}
    pairs = [(f, c) for f, c in matrix.tried() if (f.name, c.label) in chosen - refused.keys()]
    found = run_workers([made(family, case) for family, case in pairs])
    return {(family.name, case.label): rows for (family, case), rows in zip(pairs, found, strict=True)}


@pytest.fixture(scope="module")
def record():
    """Keep what was measured, for the docs, where a file for it is named."""
    measured = {}
    yield lambda family, label, **far: measured.setdefault(family, {}).update({label: far})
    if RECORD in os.environ:
        Path(os.environ[RECORD]).write_text(json.dumps(measured, indent=1) + "\n")


@pytest.mark.parametrize("family", matrix.FAMILIES, ids=lambda family: family.name)
def test_the_reference_learns_and_is_clipped(references, family):
    rows = steps(references[family.name])
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert sum(row["grad_norm"] > 0.5 for row in rows) > 5, "clipping must be active for the test to mean much"


@pytest.mark.parametrize(
    ("family", "case"), matrix.tried(), ids=lambda value: getattr(value, "label", None) or value.name
)
def test_every_strategy_gives_the_numbers_of_one_process(curves, references, refused, family, case, record):
    expected, reason = matrix.refusal(family, case), refused.get((family.name, case.label))
    assert (expected is None) == (reason is None), reason
    if reason is not None:
        assert expected in reason
        return
    rows, reference = curves[family.name, case.label], references[family.name]
    loss, norm = (furthest(rows, reference, key) for key in ("loss", "grad_norm"))
    record(family.name, case.label, loss=loss, grad_norm=norm)
    assert loss <= LIMIT
    assert norm <= LIMIT
    (expected,) = [row for row in reference if row["kind"] == "eval"]
    (measured,) = [row for row in rows if row["kind"] == "eval"]
    assert measured["loss"] == pytest.approx(expected["loss"], rel=LIMIT)


@pytest.fixture(scope="module")
def made_with(recipe):
    """Make a recipe of our own decoder."""
    return lambda name, **values: recipe(name, **{"model": matrix.DECODER, "optim__lr": matrix.LR, **values})


@pytest.fixture(scope="module")
def reference(references):
    return references["decoder"]


def test_dropout_is_the_same_on_any_number_of_ranks(corpus, storage, recipe, run_workers):
    model = {
        "type": "hf",
        "task": "causal-lm",
        "config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 320},
        "tokenizer": {"train": "bpe", "vocab_size": 320},
    }
    (one,) = run_workers([recipe("dropout-one", model=model)])
    (two,) = run_workers([recipe("dropout-two", model=model, strategy={"type": "ddp"}, scaling__num_workers=2)])
    assert furthest(two, one, "loss") <= LIMIT
    still = {**model, "config": {**model["config"], "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
    (without,) = run_workers([recipe("dropout-none", model=still)])
    assert furthest(without, one, "loss") > 100 * LIMIT, "the model must have dropout for the test to mean much"


def test_activation_checkpointing_changes_no_number(made_with, run_workers, reference):
    (rows,) = run_workers([made_with("recomputed", train__activation_checkpointing=True)])
    assert furthest(rows, reference, "loss") <= 1e-6
    assert furthest(rows, reference, "grad_norm") <= 1e-6


BF16 = [
    {"type": "fsdp"},
    *({"type": "deepspeed", "stage": stage} for stage in (1, 2, 3)),
    {"type": "deepspeed", "stage": 1, "tensor_parallel_size": 2},
    {"type": "deepspeed-3d", "pipeline_parallel_size": 2},
]


def test_bf16_stays_near_fp32_under_every_strategy(made_with, run_workers, reference):
    """Bounds of loss and norm: autocast keeps fp32 weights; DeepSpeed's bf16 rounds the working weights as well."""
    alone = made_with("bf16-single", train__precision="bf16")
    spread = [
        made_with(f"bf16-{place}", strategy=strategy, scaling__num_workers=2, train__precision="bf16")
        for place, strategy in enumerate(BF16)
    ]
    for rows in run_workers([alone, *spread]):
        assert 0 < furthest(rows, reference, "loss") <= 5e-3
        assert furthest(rows, reference, "grad_norm") <= 1e-1
