"""The hf model component: what a recipe may say."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from raytx.errors import RecipeError
from raytx.registry import registry


def _parse(**fields: Any) -> Any:
    return registry().parse("model", {"type": "hf", **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "casual-lm", "path": "gpt2"}, "Did you mean 'causal-lm'"),
        ({"task": "causal-lm"}, "give either path"),
        ({"task": "causal-lm", "path": "gpt2", "config": {"model_type": "gpt2"}}, "give either path"),
        ({"task": "causal-lm", "config": {"hidden_size": 8}, "tokenizer": "gpt2"}, "must name its architecture"),
        ({"task": "causal-lm", "config": {"model_type": [1]}, "tokenizer": "gpt2"}, "must name its architecture"),
        ({"task": "causal-lm", "config": {"model_type": None}, "tokenizer": "gpt2"}, "must name its architecture"),
        ({"task": "causal-lm", "config": {"model_type": "gpt2"}}, "has no tokenizer"),
        ({"task": "causal-lm", "path": "gpt2", "adapter": {"type": "lora", "rank": 8}}, "rank"),
    ],
)
def test_what_cannot_be_is_refused_in_the_recipe(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _parse(**fields)


def test_only_a_decoder_generates() -> None:
    assert _parse(task="causal-lm", path="gpt2").provides == {"save_pretrained", "generate"}
    assert _parse(task="sequence-classification", path="bert").provides == {"save_pretrained"}


@pytest.mark.parametrize("path", ["./model", "/model", "~/model", "runs/reviews/artifacts/hf"])
def test_a_directory_is_checked_before_anything_starts(path: str) -> None:
    assert list(_parse(task="causal-lm", path=path).local_files()) == [("path", path)]


def test_a_hub_name_is_no_file() -> None:
    assert list(_parse(task="causal-lm", path="owner/name", tokenizer="name").local_files()) == []


def test_code_from_elsewhere_is_off_unless_asked_for() -> None:
    assert _parse(task="causal-lm", path="gpt2").trust_remote_code is False


def test_an_unknown_attention_kernel_is_refused_with_the_nearest() -> None:
    component = _parse(
        task="causal-lm", config={"model_type": "gpt2"}, tokenizer={"train": "bpe"}, attn_implementation="spda"
    )
    with pytest.raises(RecipeError, match=r"no kernel 'spda'\. Did you mean 'sdpa'"):
        component.size()
