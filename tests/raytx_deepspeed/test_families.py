"""Two tensor-parallel ranks compute what one does, in every family that has a plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.raytx_deepspeed.tensor_rank import CASES

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(HERE / "tensor_rank.py")]
    where = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(directory / "rendezvous"), str(directory / "found.json")],
            env=where,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    return json.loads((directory / "found.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_logits_and_gradients_of_one(found: dict[str, Any], case: str) -> None:
    assert found[case]["cut"] > 0
    assert found[case]["logits"] <= 1e-5
    assert found[case]["gradient"] <= 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gpt2", "bert", "t5"])
def test_a_rank_holds_little_more_than_half(found: dict[str, Any], family: str) -> None:
    whole, part = found[family]["sizes"]
    assert part < 0.7 * whole
