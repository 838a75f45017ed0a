"""The forward pass of a live transformers module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raytx.tasks.decoding import decode

PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14], [5, 6, 7, 8]]
LENGTH = 12


def test_a_batch_of_prompts_decodes_greedily_to_what_generate_gives_each_alone(causal: Any) -> None:
    model, _, module = causal
    greedy = [lambda logits: int(logits.argmax())] * len(PROMPTS)
    steps = list(decode(model.runner(module), PROMPTS, greedy, [LENGTH] * len(PROMPTS)))[:-1]
    batched = [list(tokens) for tokens in zip(*steps, strict=True)]
    for prompt, tokens in zip(PROMPTS, batched, strict=True):
        alone = module.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=LENGTH,
            min_new_tokens=LENGTH,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tokens == alone[0, len(prompt) :].tolist()
    assert len({tuple(tokens) for tokens in batched}) == len(PROMPTS)


def test_cached_steps_give_the_logits_of_the_whole_sequence(causal: Any) -> None:
    model, _, module = causal
    runner = model.runner(module)
    cache, first = runner.prefill([[5, 6, 7], [8]])
    cache, second = runner.step(cache, np.array([9, 10]))
    for row, sequence in enumerate(([5, 6, 7, 9], [8, 10])):
        whole = runner.logits({"input_ids": np.array([sequence])})[0]
        assert np.abs(whole[-2] - first[row]).max() <= 1e-5
        assert np.abs(whole[-1] - second[row]).max() <= 1e-5


def test_two_decodings_do_not_disturb_each_other(causal: Any) -> None:
    model, _, module = causal
    runner = model.runner(module)
    one, _ = runner.prefill([[5, 6, 7]])
    other, _ = runner.prefill([[8, 9]])
    _, interleaved = runner.step(one, np.array([4]))
    runner.step(other, np.array([4]))
    again, _ = runner.prefill([[5, 6, 7]])
    _, straight = runner.step(again, np.array([4]))
    assert np.array_equal(interleaved, straight)


def test_logits_are_float32_numpy_and_leave_the_training_mode_as_it_was(causal: Any) -> None:
    model, _, module = causal
    module.train()
    logits = model.runner(module).logits({"input_ids": np.array([[5, 6]]), "labels": np.array([[-100, 6]])})
    assert isinstance(logits, np.ndarray)
    assert (logits.dtype, logits.shape) == (np.float32, (1, 2, 320))
    assert module.training


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "openai-gpt", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 320},
        {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 320},
    ],
    ids=lambda config: config["model_type"],
)
def test_an_architecture_without_a_cache_reads_the_whole_sequence_again(
    config: dict[str, Any], tiny: Any, tmp_path: Path
) -> None:
    fields = {"task": "causal-lm", "config": config, "tokenizer": {"train": "bpe"}, "packing": False}
    model = tiny.prepared({"type": "hf", **fields}, tmp_path, max_length=16)
    runner = model.runner(model.module(tmp_path))
    cache, first = runner.prefill([[5, 6, 7], [8]])
    cache, second = runner.step(cache, np.array([9, 10]))
    for row, sequence in enumerate(([5, 6, 7, 9], [8, 10])):
        whole = runner.logits({"input_ids": np.array([sequence])})[0]
        assert np.abs(whole[-2] - first[row]).max() <= 1e-5
        assert np.abs(whole[-1] - second[row]).max() <= 1e-5


def test_reading_again_forgets_what_lies_before_the_context(tiny: Any, tmp_path: Path) -> None:
    config = {"model_type": "openai-gpt", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 8, "vocab_size": 320}
    fields = {"task": "causal-lm", "config": config, "tokenizer": {"train": "bpe"}, "packing": False}
    model = tiny.prepared({"type": "hf", **fields}, tmp_path, max_length=8)
    runner = model.runner(model.module(tmp_path))
    cache, _ = runner.prefill([list(range(5, 13))])
    _, logits = runner.step(cache, np.array([20]))
    whole = runner.logits({"input_ids": np.array([[*range(6, 13), 20]])})[0]
    assert np.abs(whole[-1] - logits[0]).max() <= 1e-5
