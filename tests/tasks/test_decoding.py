"""Decoding: greedy is the best token, sampling keeps to its limits and repeats under a seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from raytx.tasks.decoding import decode, sampler

SHARES = np.array([0.05, 0.5, 0.15, 0.3])
LOGITS = np.log(SHARES)


def drawn(count: int = 4000, **request: Any) -> dict[int, float]:
    choose = sampler({"temperature": 1.0, "seed": 0} | request)
    return {token: n / count for token, n in Counter(choose(LOGITS) for _ in range(count)).items()}


@pytest.mark.parametrize(
    "request_", [{}, {"temperature": 0}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1, "top_p": 0}]
)
def test_without_temperature_or_choice_the_best_token_is_taken(request_: dict[str, Any]) -> None:
    choose = sampler(request_)
    assert {choose(LOGITS) for _ in range(50)} == {1}


def test_sampling_follows_the_probabilities() -> None:
    found = drawn()
    assert [found[token] for token in range(4)] == pytest.approx(SHARES, abs=0.03)


def test_top_k_draws_from_the_k_best_in_proportion() -> None:
    found = drawn(top_k=2)
    assert set(found) == {1, 3}
    assert found[1] == pytest.approx(0.5 / 0.8, abs=0.03)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, {1}), (0.6, {1, 3}), (0.81, {1, 2, 3}), (1.0, {0, 1, 2, 3})])
def test_top_p_draws_from_the_smallest_head_that_reaches_it(top_p: float, kept: set[int]) -> None:
    assert set(drawn(top_p=top_p)) == kept


def test_top_k_cuts_before_top_p() -> None:
    assert set(drawn(top_k=2, top_p=0.6)) == {1}, "of the two best, the first has 0.625"


def test_a_low_temperature_sharpens_and_a_high_one_flattens() -> None:
    assert drawn(temperature=0.2)[1] > 0.9
    assert drawn(temperature=50.0)[0] == pytest.approx(0.25, abs=0.03)


def test_a_seed_repeats_the_draw_and_another_does_not() -> None:
    def draws(seed: int) -> list[int]:
        choose = sampler({"temperature": 1.0, "seed": seed})
        return [choose(LOGITS) for _ in range(40)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_huge_logits_do_not_overflow() -> None:
    assert sampler({"temperature": 0.01, "seed": 0})(np.array([-1e6, 1e6, 0.0], dtype=np.float32)) == 1


class Counting:
    """A runner whose best next token is the number of tokens that a prompt has by now."""

    def __init__(self) -> None:
        self.steps = 0

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], np.ndarray]:
        return self._next([len(prompt) for prompt in prompts])

    def step(self, cache: list[int], tokens: np.ndarray) -> tuple[list[int], np.ndarray]:
        assert tokens.tolist() == cache, "the tokens chosen are the tokens appended"
        self.steps += 1
        return self._next([length + 1 for length in cache])

    def _next(self, lengths: list[int]) -> tuple[list[int], np.ndarray]:
        return lengths, np.stack([np.eye(100)[length] for length in lengths])

    def logits(self, features: dict[str, Any]) -> np.ndarray:
        raise AssertionError("decoding reads prompts by prefill and step")


def test_each_prompt_gets_tokens_up_to_its_own_limit() -> None:
    runner = Counting()
    rows = list(decode(runner, [[7], [7, 7, 7]], [sampler({})] * 2, [3, 1]))
    assert rows == [[1, 3], [2, None], [3, None], [None, None]]
    assert runner.steps == 2, "the last token needs no further pass"


def test_closing_the_iterator_stops_the_work() -> None:
    runner = Counting()
    answers = decode(runner, [[7]], [sampler({})], [50])
    assert [next(answers), next(answers)] == [[1], [2]]
    answers.close()  # type: ignore[attr-defined]
    assert runner.steps == 1
