"""A decoder cut into the pieces of a pipeline computes what the whole one does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from raytx.components import Piece
from raytx.errors import RecipeError
from raytx.place import place
from raytx_hf.adapter import adapted
from raytx_hf.model import LoRA
from raytx_hf.pieces import cut, why_not
from raytx_torch.decoder_model import RaytxDecoderForCausalLM, RaytxDecoderModel
from tests.raytx_hf.families import CAUSAL, model_of, spread

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79, 32, 38], [46, 26, 43, 38, 32, 79, 50, 28, 84, 19]])
FEATURES = {
    "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]),
    "attention_mask": torch.tensor([[1] * 10, [1] * 6 + [0] * 4]),
}


def run(pieces: Sequence[Piece], ids: torch.Tensor, *features: torch.Tensor | None, wire: bool = False) -> torch.Tensor:
    """Return the logits; over a wire, each piece gets a plain tuple, as the first of a stage does."""
    travel: Any = (ids, *features)
    for piece in pieces:
        travel = piece.module(tuple(travel) if wire and isinstance(travel, tuple) else travel)
    return travel


def filled(structure: nn.Module, whole: nn.Module, travelling: Sequence[str]) -> list[Piece]:
    """Return the structure's pieces with the weights of a whole model, given one by one by the names pieces tell."""
    pieces = cut(structure, travelling)
    tensors = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    stages = nn.ModuleList(piece.module for piece in pieces)
    names = {f"{index}.{here}": name for index, piece in enumerate(pieces) for here, name in piece.names.items()}

    def made(here: str, old: torch.Tensor) -> torch.Tensor:
        value = tensors[names[here]].detach().clone() if old.is_meta else old
        return nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value

    place(stages, made)
    return pieces


def gradients(pieces: Sequence[Piece]) -> dict[str, torch.Tensor]:
    return {
        name: piece.module.get_parameter(here).grad
        for piece in pieces
        for here, name in piece.names.items()
        if here in dict(piece.module.named_parameters()) and piece.module.get_parameter(here).grad is not None
    }


def assert_same(pieces: Sequence[Piece], whole: Any, feature: str, *, wire: bool) -> None:
    expected = whole(input_ids=IDS, **{feature: FEATURES[feature]}).logits
    logits = run(pieces, IDS, FEATURES[feature], wire=wire)
    assert torch.equal(logits, expected)
    for value in (logits, expected):
        value.square().mean().backward()
    found = gradients(pieces)
    wanted = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("family", CAUSAL)
def test_pieces_have_the_logits_and_gradients_of_the_whole(family: str, feature: str) -> None:
    whole = model_of(family)
    assert_same(filled(model_of(family, device="meta"), whole, (feature,)), whole, feature, wire=True)


@pytest.mark.parametrize("family", CAUSAL)
def test_pieces_of_one_stage_share_what_they_asked_for(family: str) -> None:
    whole = model_of(family)
    assert_same(filled(model_of(family, device="meta"), whole, ("position_ids",)), whole, "position_ids", wire=False)


@pytest.mark.parametrize("family", CAUSAL)
def test_packed_documents_stay_apart_in_every_piece(family: str) -> None:
    pieces = cut(model_of(family), ("position_ids",))
    packed = run(pieces, IDS[:1], FEATURES["position_ids"][:1], wire=True)[:, 3:]
    alone = run(pieces, IDS[:1, 3:], torch.arange(7)[None], wire=True)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "raytx_decoder", "gemma3_text"])
@pytest.mark.parametrize("wire", [True, False], ids=["stages", "one stage"])
def test_recomputed_layers_give_the_same(family: str, wire: bool) -> None:
    whole, structure = model_of(family).train(), model_of(family, device="meta").train()
    for model in (whole, structure):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    pieces = filled(structure, whole, ("attention_mask",))
    assert_same(pieces, whole, "attention_mask", wire=wire)


@pytest.mark.parametrize("family", ["llama", "gpt2", "raytx_decoder"])
def test_adapters_are_cut_with_their_layers(family: str) -> None:
    lora = LoRA(r=4, target_modules="all-linear")
    whole = spread(adapted(model_of(family), lora, task="causal-lm"))
    with torch.device("meta"):
        structure = adapted(model_of(family, device="meta"), lora, task="causal-lm")
    pieces = filled(structure, whole, ("position_ids",))
    assert_same(pieces, whole, "position_ids", wire=True)
    assert all("lora_" in name for name in gradients(pieces))


def test_each_tensor_is_named_once_but_a_tied_head() -> None:
    module = model_of("gemma", device="meta")
    pieces = cut(module, ("position_ids",))
    held = [name for piece in pieces for here, name in piece.names.items() if here.endswith((".weight", ".bias"))]
    assert sorted(held) == sorted([*dict(module.named_parameters()), "model.embed_tokens.weight"])


def test_the_last_piece_holds_the_very_parameter_of_a_tied_embedding() -> None:
    module = model_of("gpt2", device="meta")
    pieces = cut(module, ())
    embedding = module.get_input_embeddings().weight
    assert all(any(p is embedding for p in piece.module.parameters()) for piece in (pieces[0], pieces[-1]))
    assert not any(p is embedding for piece in pieces[1:-1] for p in piece.module.parameters())


def test_dropout_is_drawn_by_the_first_piece_alone() -> None:
    """Stages draw by themselves: those behind the first must not draw for embeddings they do not have."""
    pieces = cut(model_of("gpt2", embd_pdrop=0.5).train(), ())
    hidden = pieces[0].module((IDS,))[0]
    assert not torch.equal(hidden, pieces[0].module((IDS,))[0])
    before = torch.random.get_rng_state()
    run(pieces[1:], hidden, wire=True)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_that_travels_may_be_missing(feature: str) -> None:
    """Packed samples come without a mask and padded ones without positions, to pieces that pass on both."""
    whole = model_of("llama")
    pieces = cut(whole, tuple(FEATURES))
    given = {name: FEATURES[name] if name == feature else None for name in FEATURES}
    logits = run(pieces, IDS, *given.values(), wire=True)
    assert torch.equal(logits, whole(input_ids=IDS, **given).logits)


def test_the_proof_draws_nothing_from_the_generator() -> None:
    module = model_of("llama", device="meta")
    before = torch.random.get_rng_state()
    cut(module, ("position_ids",))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("family", "task", "reason"),
    [
        ("bert", "sequence-classification", "pipelines train decoders for causal-lm"),
        ("t5", "sequence-classification", "pipelines train decoders for causal-lm"),
        ("t5", "causal-lm", "it is an encoder-decoder"),
        ("bert", "causal-lm", "it is no decoder under a language-model head"),
    ],
)
def test_what_is_no_decoder_is_refused_with_what_works(family: str, task: str, reason: str) -> None:
    told = why_not(model_of(family, device="meta"), task)
    assert told.startswith(reason)
    assert "fsdp" in told
    assert "deepspeed" in told


def test_a_loss_that_needs_every_stage_is_refused() -> None:
    module = model_of("mixtral", device="meta", output_router_logits=True)
    with pytest.raises(RecipeError, match=r"'mixtral' cannot be cut .* experts' balance \(output_router_logits\)"):
        cut(module, ())


def test_a_layer_used_twice_is_refused() -> None:
    module = model_of("llama", device="meta")
    module.model.layers[1] = module.model.layers[0]
    with pytest.raises(RecipeError, match=r"model\.layers\.0\..* belongs to several pieces"):
        cut(module, ())


class Doubling(RaytxDecoderModel):
    """A base model that does for ids what it does not for hidden states."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids, **kwargs)
        output.last_hidden_state = output.last_hidden_state * (1 if input_ids is None else 2)
        return output


class Peeking(RaytxDecoderModel):
    """A base model that needs its embedding behind its layers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state + self.embed_tokens.weight[0]
        return output


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (Doubling, r"'raytx_decoder' cannot be cut .*: its logits would differ by .* fsdp"),
        (Peeking, r"a small copy of it could not be tried in pieces \(AttributeError"),
    ],
)
def test_a_family_that_pieces_would_change_is_refused(base: Any, reason: str) -> None:
    class Odd(RaytxDecoderForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = base(config)
            self.post_init()

    with torch.device("meta"):
        module = Odd(model_of("raytx_decoder", device="meta").config)
    with pytest.raises(RecipeError, match=reason):
        cut(module, ("position_ids",))
