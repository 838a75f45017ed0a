"""Cut a decoder into the pieces of a pipeline, whatever its family: embedding, each layer, head.

No forward pass is written again here. The base model's own runs with stand-ins for its layers, which note how they
are called: with which mask, which rotary angles, in which layer's way. A piece then calls its layer just so.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from raytx.components import Piece
from raytx.errors import RecipeError
from raytx.place import names

INSTEAD = "fsdp and deepspeed (ZeRO) spread it without a pipeline"


def cut(module: nn.Module, travelling: Sequence[str]) -> list[Piece]:
    """Return the pieces; raise RecipeError where the cut would not compute what the whole does.

    `travelling` names the features besides input_ids that reach every piece. The pieces hold the module's own tensors
    and layers, not copies; only what surrounds the layers is a shallow copy that has some of its children.
    """
    from raytx_hf.proof import flaw  # which cuts by itself

    if reason := why_not(module, "causal-lm") or flaw(module, travelling):
        raise RecipeError(f"model: {family(module)!r} cannot be cut for a pipeline: {reason}")
    return pieces_of(module, travelling)


def pieces_of(module: nn.Module, travelling: Sequence[str]) -> list[Piece]:
    """Return the pieces of a module that why_not() has nothing against, without proof."""
    frame = frame_of(plain(module))
    asking = Asking(frame, travelling, embeds=False)
    middle = [LayerPiece(layer, index, asking) for index, layer in enumerate(frame.layers)]
    modules = [EmbeddingPiece(Asking(frame, travelling, embeds=True)), *middle, HeadPiece(frame)]
    known = names(module)
    return [Piece(piece, {here: known[tensor] for tensor, here in names(piece).items()}) for piece in modules]


def why_not(module: nn.Module, task: str) -> str:
    """Return why a structure has no pieces, as a clause about "it" with what works instead; "" where it has."""
    reason = _misshapen(plain(module), task)
    return reason and f"{reason}; {INSTEAD}"


def plain(module: nn.Module) -> Any:
    """Return the transformers model under adapters, which were put into its own layers."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def family(module: nn.Module) -> str:
    return plain(module).config.model_type


# ---------------------------------------------------------------------------------------------------------- pieces


@dataclass(frozen=True)
class Call:
    """How the base model calls one layer, but for the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def of(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Return the layer's hidden states; older families return them first of several."""
        output = layer(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


class Travel(tuple[torch.Tensor, ...]):
    """Hidden states and features on their way through the pieces of one stage, which share masks and rotary angles.

    A stage receives a plain tuple from the one before, so its first piece asks for the calls again.
    """

    calls: list[Call]

    @classmethod
    def of(cls, hidden: torch.Tensor, features: Sequence[torch.Tensor], calls: list[Call]) -> Travel:
        travel = cls((hidden, *features))
        travel.calls = calls
        return travel


class EmbeddingPiece(nn.Module):
    """(input ids, *features) to (hidden states, *features): what the base model does before its first layer."""

    def __init__(self, asking: Asking) -> None:
        super().__init__()
        self.asking = asking

    def forward(self, travel: tuple[torch.Tensor, ...]) -> Travel:
        input_ids, *features = travel
        hidden, calls = self.asking(features, input_ids=input_ids)
        return Travel.of(hidden, features, calls)


class LayerPiece(nn.Module):
    """(hidden states, *features) to the same behind one layer."""

    def __init__(self, layer: nn.Module, index: int, asking: Asking) -> None:
        super().__init__()
        self.layer, self.index, self.asking = layer, index, asking

    def forward(self, travel: tuple[torch.Tensor, ...]) -> Travel:
        hidden, *features = travel
        calls = travel.calls if isinstance(travel, Travel) else self._ask(hidden, features)
        return Travel.of(calls[self.index].of(self.layer, hidden), features, calls)

    @torch.no_grad()
    def _ask(self, hidden: torch.Tensor, features: Sequence[torch.Tensor]) -> list[Call]:
        return self.asking(features, inputs_embeds=hidden)[1]


class HeadPiece(nn.Module):
    """(hidden states, *features) to logits: what the model does after its last layer, final norm to soft cap."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        norm = next(iter(frame.behind), None)
        changed = {**frame.blanks(frame.before), frame.layers_name: nn.ModuleList()}
        self.given = [Given(frame.behind[norm])] if norm else []
        base = shell(frame.base, changed | ({norm: self.given[0]} if norm else {}))
        self.whole = shell(frame.whole, {frame.base_name: base})

    def forward(self, travel: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Features stay out: with no layers there is nothing to mask."""
        hidden = travel[0]
        for given in self.given:
            given.hidden = hidden
        try:
            return self.whole(inputs_embeds=hidden, use_cache=False).logits
        finally:
            for given in self.given:
                given.hidden = None


# -------------------------------------------------------------------------------------------------------- stand-ins


class Asking(nn.Module):
    """The base model's own forward pass, up to the last call of a layer."""

    def __init__(self, frame: Frame, travelling: Sequence[str], *, embeds: bool) -> None:
        super().__init__()
        self.travelling, self.calls = tuple(travelling), []
        count = len(frame.layers)
        notes = (Note(layer, self.calls, last=index == count - 1) for index, layer in enumerate(frame.layers))
        blanks = frame.blanks(frame.behind if embeds else {**frame.before, **frame.behind})
        self.base = shell(frame.base, {**blanks, frame.layers_name: nn.ModuleList(notes)})

    def forward(self, features: Sequence[torch.Tensor], **inputs: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """Return what the first layer is given, and every layer's call."""
        self.calls.clear()
        with contextlib.suppress(_AskedError):
            self.base(**inputs, **dict(zip(self.travelling, features, strict=True)), use_cache=False)
        noted, self.calls[:] = list(self.calls), []
        return noted[0][0], [call for _, call in noted]


class _AskedError(Exception):
    """Every layer was called; what comes after is another piece's work."""


class Note(nn.Module):
    """Stands where a layer stands and notes how it is called."""

    def __init__(self, layer: nn.Module, calls: list[tuple[torch.Tensor, Call]], *, last: bool) -> None:
        super().__init__()
        # Some base models choose mask or angles by what a layer says of itself.
        self.__dict__ |= {key: value for key, value in vars(layer).items() if isinstance(value, int | float | str)}
        self.calls, self.last = calls, last

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        self.calls.append((hidden, Call(tuple(rest), kwargs)))
        if self.last:
            raise _AskedError
        return hidden


class Given(nn.Module):
    """The final norm, applied to the hidden states given instead of to what a model without layers comes to."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.hidden: torch.Tensor | None = None

    def forward(self, _: Any) -> torch.Tensor:
        return self.norm(self.hidden)


class Blank(nn.Module):
    """Stands where another piece's module stands: passes numbers on, and embeds ids as a zero to add."""

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return x if x.is_floating_point() else torch.zeros((), device=x.device)


def shell(module: nn.Module, changed: Mapping[str, nn.Module]) -> Any:
    """Return a copy of a module that shares everything with it but the children changed."""
    copied = copy.copy(module)
    copied._modules = {**module._modules, **changed}
    return copied


# ------------------------------------------------------------------------------------------------------------ shape


@dataclass(frozen=True)
class Frame:
    """Where the parts of a decoder are."""

    whole: Any
    """The model with its head."""
    base_name: str
    base: Any
    """What turns ids into hidden states."""
    layers_name: str
    layers: nn.ModuleList
    before: Mapping[str, nn.Module]
    """The base's children that work before its layers: those with parameters, and dropout, which draws."""
    behind: Mapping[str, nn.Module]
    """The base's children that work after its layers."""

    @staticmethod
    def blanks(children: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return {name: Blank() for name in children}


def frame_of(whole: Any) -> Frame:
    """Read the parts off a decoder. Families define their children in the order in which they run."""
    base_name = whole.base_model_prefix
    base = getattr(whole, base_name)
    layers_name = _layers_name(base)
    assert layers_name is not None
    children = list(base.named_children())
    place = [name for name, _ in children].index(layers_name)
    before, behind = (dict(filter(_works, part)) for part in (children[:place], children[place + 1 :]))
    return Frame(whole, base_name, base, layers_name, getattr(base, layers_name), before, behind)


def _works(child: tuple[str, nn.Module]) -> bool:
    """Rotary angles have no parameters, and every piece may need them."""
    return isinstance(child[1], nn.Dropout) or next(child[1].parameters(), None) is not None


def _layers_name(base: nn.Module) -> str | None:
    count = base.config.get_text_config().num_hidden_layers
    lists = [name for name, child in base.named_children() if isinstance(child, nn.ModuleList) and len(child) == count]
    return lists[0] if len(lists) == 1 else None


def _misshapen(whole: Any, task: str) -> str:
    base = getattr(whole, whole.base_model_prefix, None)
    if task != "causal-lm":
        return f"pipelines train decoders for causal-lm, and its task is {task}"
    if whole.config.is_encoder_decoder:
        return "it is an encoder-decoder, whose decoder needs the encoder's output at every layer"
    if not isinstance(base, nn.Module) or not whole.can_generate():
        return "it is no decoder under a language-model head"
    if _layers_name(base) is None:
        return "its layers are no list that its base model runs through itself"
    if getattr(whole.config.get_text_config(), "output_router_logits", False):
        return "its loss has a part for the experts' balance (output_router_logits), which no single stage can compute"
    return _shared_or_lost(whole)


def _shared_or_lost(whole: Any) -> str:
    """A parameter of two pieces would be updated by parts of its gradient; only a tied head is known to engines."""
    pieces = [{id(p) for p in piece.module.parameters()} for piece in pieces_of(whole, ())]
    ends = (0, len(pieces) - 1)
    for name, parameter in whole.named_parameters():
        holders = tuple(index for index, held in enumerate(pieces) if id(parameter) in held)
        if len(holders) != 1 and holders != ends:
            return f"its parameter {name} belongs to {'several pieces' if holders else 'no piece'}"
    return ""
