"""The proof that an architecture sees no token that comes later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raytx.errors import RecipeError


def _component(config: dict[str, Any]) -> dict[str, Any]:
    tokenizer = {"train": "bpe", "vocab_size": 320}
    return {"type": "hf", "task": "causal-lm", "config": config, "tokenizer": tokenizer, "packing": False}


def test_an_encoder_is_refused_with_what_makes_it_a_decoder(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"'bert' sees tokens that come later .* Set is_decoder: true in model\.config"
    ):
        tiny.prepared(_component(tiny.bert | {"vocab_size": 320}), tmp_path)


def test_an_encoder_said_to_be_a_decoder_is_accepted(tiny: Any, tmp_path: Path) -> None:
    model = tiny.prepared(_component(tiny.bert | {"vocab_size": 320, "is_decoder": True}), tmp_path)
    module = model.module(tmp_path).eval()
    one, other = (module(input_ids=torch.tensor([[5, 6, 7, last]])).logits[:, :3] for last in (8, 9))
    assert torch.equal(one, other)


def test_a_family_that_knows_no_such_switch_is_refused_without_it(tiny: Any, tmp_path: Path) -> None:
    xlnet = {"model_type": "xlnet", "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": 320}
    with pytest.raises(RecipeError, match=r"'xlnet' sees tokens that come later .*\. Choose a decoder$"):
        tiny.prepared(_component(xlnet), tmp_path)
