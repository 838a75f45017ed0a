"""The ONNX runner: text token by token, packed rows, and features it does not take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from raytx.tasks.base import Runner

PROMPTS = ["def f(x", "the quick brown fox jumps over", "a"]
DECODERS = ("llama", "gpt2", "decoder", "gpt")


class Rereading:
    """A live model made to generate in the plainest way: each sequence alone, without cache, padding or batch."""

    def __init__(self, live: Runner) -> None:
        self.live = live

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, np.ndarray]:
        rows = [list(prompt) for prompt in prompts]
        return rows, np.stack([self.live.logits({"input_ids": np.array([row])})[0, -1] for row in rows])

    def step(self, cache: Any, tokens: np.ndarray) -> tuple[Any, np.ndarray]:
        return self.prefill([[*row, int(token)] for row, token in zip(cache, tokens, strict=True)])


@pytest.mark.parametrize("family", DECODERS)
def test_greedy_tokens_are_the_live_models_for_prompts_of_different_lengths(export: Any, family: str) -> None:
    made = export(family)
    requests = [{"prompt": prompt, "max_tokens": limit} for prompt, limit in zip(PROMPTS, (9, 5, 12), strict=True)]
    wanted, got = (made.exportable.task.predict(runner, requests) for runner in (Rereading(made.live), made.runner))
    assert [answer["tokens"] for answer in got] == [answer["tokens"] for answer in wanted]
    assert [answer["completion_tokens"] for answer in got] == [9, 5, 12]


@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_a_prompt_gets_the_same_tokens_alone_as_in_a_batch(export: Any, family: str) -> None:
    made = export(family)
    together = made.exportable.task.predict(made.runner, [{"prompt": prompt, "max_tokens": 8} for prompt in PROMPTS])
    alone = [made.exportable.task.predict(made.runner, [{"prompt": p, "max_tokens": 8}])[0] for p in PROMPTS]
    assert [answer["tokens"] for answer in together] == [answer["tokens"] for answer in alone]


@pytest.mark.parametrize("family", ["gpt2", "gpt"])
def test_a_sequence_that_ended_may_ride_along_past_the_context(export: Any, family: str) -> None:
    """GPT-2's positions are a table: one past its end would be an error, not a bad answer."""
    made = export(family)
    context = made.exportable.task.context_length
    requests = [{"prompt": [5] * (context - 2), "max_tokens": 2}, {"prompt": [7, 9], "max_tokens": 12}]
    answers = made.exportable.task.predict(made.runner, requests)
    alone = made.exportable.task.predict(made.runner, requests[1:])
    assert [answer["completion_tokens"] for answer in answers] == [2, 12]
    assert answers[1]["tokens"] == alone[0]["tokens"]


def test_a_cache_may_be_stepped_from_twice(export: Any) -> None:
    runner = export("llama").runner
    cache, _ = runner.prefill([[5, 6, 7], [8]])
    first = runner.step(cache, np.array([3, 4]))[1]
    runner.step(cache, np.array([9, 9]))
    np.testing.assert_array_equal(runner.step(cache, np.array([3, 4]))[1], first)


@pytest.mark.parametrize("family", ["llama", "gpt2", "decoder"])
def test_documents_packed_into_one_row_do_not_see_each_other(export: Any, family: str) -> None:
    made = export(family)
    batch = made.batches["packed"]
    assert (batch["position_ids"][:, 1:] == 0).any(), "the batch should hold rows of several documents"
    np.testing.assert_allclose(made.runner.logits(batch), made.live.logits(batch), atol=1e-4)


def test_without_a_mask_every_token_is_real(export: Any) -> None:
    made = export("llama")
    batch = {"input_ids": np.array([[5, 6, 7, 8]]), "labels": np.array([[5, 6, 7, 8]])}
    np.testing.assert_allclose(made.runner.logits(batch), made.live.logits(batch), atol=1e-4)


def test_it_uses_as_many_threads_as_the_process_was_given(export: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert export("bert").runner.session.get_session_options().intra_op_num_threads == 1
