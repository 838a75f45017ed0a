"""Prove that an architecture sees no token that comes later, before anything learns to predict the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig

from raytx.errors import RecipeError
from raytx_hf.miniature import miniature

if TYPE_CHECKING:
    from raytx_hf.model import HFModel

TOKENS, OTHER_LAST = [3, 4, 5, 6, 7, 8, 9, 10], 11
TOLERANCE = 1e-4


def check_causality(model: HFModel, config: PreTrainedConfig) -> None:
    """Change the last token and compare the logits before it; raise RecipeError where they move.

    transformers gives many encoders a language-model head; one that sees its labels reaches a loss near zero and
    can complete nothing.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        module = miniature(model, config)
        try:
            one, other = (
                module(input_ids=torch.tensor([[*TOKENS[:-1], last]])).logits[:, :-1]
                for last in (TOKENS[-1], OTHER_LAST)
            )
        except Exception as error:  # the architecture's own code, on a shape its authors may not have tried
            why = " ".join(str(error).split())[:300]
            raise RecipeError(f"model: {config.model_type!r} could not be tried for causality: {why}") from None
    difference = float((one - other).abs().max() / one.abs().max())
    if not difference <= TOLERANCE:
        raise RecipeError(
            f"model: {config.model_type!r} sees tokens that come later (logits change by {difference:.0e} with the "
            f"token after them), so it cannot learn to predict them as task 'causal-lm' asks. {_remedy(model, config)}"
        )


def _remedy(model: HFModel, config: PreTrainedConfig) -> str:
    if getattr(config, "is_decoder", None) is not False:
        return "Choose a decoder"
    where = "model.config" if model.config is not None else f"config.json of a copy of {model.path}"
    return f"Set is_decoder: true in {where}, or choose a decoder"
