"""Causal language modelling: predict the next token; pack documents without leaks; complete prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from raytx.tasks.base import IGNORED, Features, Request, Response, Row, Runner, Task, cross_entropy
from raytx.tasks.decoding import decode, sampler

Segment = list[int]


class CausalLM(Task):
    """Predict each token from those before it."""

    name = "causal-lm"
    protocol = "openai"
    metrics_mode: ClassVar[dict[str, Literal["min", "max"]]] = {"loss": "min", "perplexity": "min"}
    needs_logits = False
    required_columns = ("text",)

    def __init__(self, tokenizer: Any, *, max_length: int, packing: bool = True, context_length: int = 0) -> None:
        super().__init__(tokenizer, max_length=max_length)
        self.packing = packing
        self.context_length = context_length or max_length
        self.eos: int = tokenizer.eos_token_id
        self.pad: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos

    @classmethod
    def fit(cls, rows: Callable[[], Iterator[Row]]) -> dict[str, Any]:
        return {}

    def state(self) -> dict[str, Any]:
        return super().state() | {"packing": self.packing, "context_length": self.context_length}

    # ---- training

    def features(self, rows: Iterable[Row], rejected: Callable[[int, str], None]) -> Iterator[Features]:
        segments = self._segments(rows, rejected)
        bins = pack(segments, self.max_length) if self.packing else ([segment] for segment in segments)
        for segments_of_sample in bins:
            yield _sample(segments_of_sample)

    def _segments(self, rows: Iterable[Row], rejected: Callable[[int, str], None]) -> Iterator[Segment]:
        """Yield each document's tokens with the end-of-sequence token, cut into pieces of at most max_length."""
        for index, row in enumerate(rows):
            text = row.get("text")
            if not isinstance(text, str) or not text:
                rejected(index, "empty text")
                continue
            yield from cut([*self.tokenizer.encode(text, add_special_tokens=False), self.eos], self.max_length)

    def collate(self, samples: Sequence[Features]) -> Features:
        width = max(len(sample["input_ids"]) for sample in samples)
        batch = {
            "input_ids": _pad([sample["input_ids"] for sample in samples], width, self.pad),
            "labels": _pad([sample["labels"] for sample in samples], width, IGNORED),
        }
        if self.packing:
            # No mask travels: positions that restart at 0 are what tells the model where a document begins. Padding
            # is a row of one-token documents, so that nothing attends to it and it attends to nothing.
            batch["position_ids"] = _pad([sample["position_ids"] for sample in samples], width, 0)
        else:
            batch["attention_mask"] = _pad([[1] * len(sample["input_ids"]) for sample in samples], width, 0)
        return batch

    def loss(self, batch: Features, logits: np.ndarray) -> float:
        return cross_entropy(logits[:, :-1], batch["labels"][:, 1:])

    def evaluation(self, batch: Features, loss: float, logits: np.ndarray | None, num_targets: int) -> Features:
        return {"loss_sum": np.array([loss * num_targets]), "num_targets": np.array([num_targets])}

    def metrics(self, parts: Sequence[Features]) -> dict[str, float]:
        loss = _total(parts, "loss_sum") / max(1.0, _total(parts, "num_targets"))
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def baseline(self, samples: Iterable[Features]) -> tuple[str, dict[str, float]]:
        counts: np.ndarray = np.zeros(len(self.tokenizer), dtype=np.int64)
        for sample in samples:
            counts += np.bincount(np.asarray(sample["input_ids"]), minlength=len(counts))
        share = counts[counts > 0] / max(1, counts.sum())
        entropy = float(-(share * np.log(share)).sum())
        return "unigram entropy of the corpus", {"loss": entropy, "perplexity": math.exp(entropy)}

    def golden(self, samples: Sequence[Features]) -> Features:
        """Take the first document of each sample, in unequal lengths, so that padding is part of what is recorded."""
        rows = []
        for place, sample in enumerate(samples):
            documents = _documents(sample)
            rows.append(max(documents, key=len)[: max(2, 32 - 7 * place)])
        width = max(map(len, rows))
        return {
            "input_ids": _pad(rows, width, self.pad),
            "attention_mask": _pad([[1] * len(row) for row in rows], width, 0),
        }

    # ---- serving

    def demo(self, samples: Sequence[Features]) -> list[tuple[Request, str]]:
        """Continue the beginning of a document; sampled, since greedy text of a small model repeats itself."""
        prompts = [max(_documents(sample), key=len)[:24] for sample in samples]
        choices = {"max_tokens": 32, "temperature": 0.7, "top_p": 0.9, "seed": 0}
        return [
            ({"prompt": ids, **choices}, self.tokenizer.decode(ids, skip_special_tokens=True).strip("\n"))
            for ids in prompts
        ]

    def show(self, response: Response) -> str:
        return str(response["text"])

    def encode_prompt(self, request: Request) -> list[int]:
        """Return a prompt's token ids; a prompt may come as text or as ids. An empty one starts a document."""
        prompt = request["prompt"]
        ids = list(prompt) if isinstance(prompt, list) else self.tokenizer.encode(prompt, add_special_tokens=False)
        return ids or [self.eos]

    def predict(self, runner: Runner, requests: Sequence[Request]) -> list[Response]:
        """Complete prompts. A request has "prompt" and optionally max_tokens, temperature, top_p, top_k, seed, stop."""
        prompts = [self.encode_prompt(request) for request in requests]
        limits = self._limits(prompts, requests)
        if len(requests) > 1 and max(map(len, prompts)) + max(limits) > self.context_length:
            # A sequence that is done is carried along until all are; none may be carried past the model's positions.
            return [answer for request in requests for answer in self.predict(runner, [request])]
        answers = [_Answer(self.tokenizer, request, len(ids)) for request, ids in zip(requests, prompts, strict=True)]
        for tokens in decode(runner, prompts, [sampler(r) for r in requests], limits):
            for answer, token in zip(answers, tokens, strict=True):
                answer.take(token, self.eos)
            if all(answer.finished for answer in answers):
                break
        return [answer.whole() for answer in answers]

    def stream(self, runner: Runner, request: Request) -> Iterator[Response]:
        """Complete one prompt, yielding {"text": new characters} and at last a response with finish_reason."""
        prompt = self.encode_prompt(request)
        answer = _Answer(self.tokenizer, request, len(prompt))
        for (token,) in decode(runner, [prompt], [sampler(request)], self._limits([prompt], [request])):
            answer.take(token, self.eos)
            if piece := answer.ready():
                yield {"text": piece, "finish_reason": None}
            if answer.finished:
                break
        yield answer.whole() | {"text": answer.ready(last=True)}

    def _limits(self, prompts: Sequence[Sequence[int]], requests: Sequence[Request]) -> list[int]:
        return [
            max(1, min(request.get("max_tokens", 16), self.context_length - len(prompt)))
            for prompt, request in zip(prompts, requests, strict=True)
        ]


def cut(tokens: Segment, max_length: int) -> Iterator[Segment]:
    """Cut tokens into pieces of at most max_length, none of them a single token, which would have nothing to predict.

    Nothing is lost, but for the odd last token where max_length is 2.
    """
    while len(tokens) > 1:
        size = min(len(tokens), max_length)
        size -= len(tokens) - size == 1 and size > 2
        yield tokens[:size]
        tokens = tokens[size:]


def pack(segments: Iterable[Segment], max_length: int) -> Iterator[list[Segment]]:
    """Put segments, in order, into bins of at most max_length tokens, cutting a segment where a bin is full.

    No piece is a single token; where a bin's last two places could only hold a piece that leaves one behind, they stay
    empty.
    """
    held: list[Segment] = []
    room = max_length
    for segment in segments:
        while len(segment) > 1:
            if room < 2 or (room == 2 and len(segment) == 3 and held):
                yield held
                held, room = [], max_length
            piece = next(cut(segment, room))
            segment = segment[len(piece) :]
            held.append(piece)
            room -= len(piece)
    if held:
        yield held


def _sample(segments: Sequence[Segment]) -> Features:
    """Join segments; the first token of each is no target, since nothing before it belongs to its document."""
    input_ids = [token for segment in segments for token in segment]
    labels = [label for segment in segments for label in (IGNORED, *segment[1:])]
    position_ids = [place for segment in segments for place in range(len(segment))]
    num_targets = len(input_ids) - len(segments)
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "num_targets": num_targets}


def _documents(sample: Features) -> list[Segment]:
    """Split a sample's tokens where positions restart."""
    starts = [place for place, position in enumerate(sample["position_ids"]) if position == 0]
    return [
        sample["input_ids"][start:end]
        for start, end in zip(starts, [*starts[1:], len(sample["input_ids"])], strict=True)
    ]


def _pad(rows: Sequence[Sequence[int]], width: int, value: int) -> np.ndarray:
    batch = np.full((len(rows), width), value, dtype=np.int64)
    for place, row in enumerate(rows):
        batch[place, : len(row)] = row
    return batch


def _total(parts: Sequence[Features], key: str) -> float:
    return float(sum(part[key].sum() for part in parts))


class _Answer:
    """The growing answer to one request: tokens, text, and why it ended."""

    def __init__(self, tokenizer: Any, request: Request, prompt_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.stops: list[str] = request.get("stop") or []
        self.prompt_tokens = prompt_tokens
        self.tokens: list[int] = []
        self.text = ""
        self.sent = 0
        self.count = 0
        self.finish_reason: str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def take(self, token: int | None, eos: int) -> None:
        """Add a token; None says that the request's token limit is reached."""
        if self.finished:
            return
        if token is None:
            self.finish_reason = "length"
            return
        self.count += 1
        if token == eos:
            self.finish_reason = "stop"
            return
        self.tokens.append(token)
        self.text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        ends = [place for stop in self.stops if (place := self.text.find(stop)) >= 0]
        if ends:
            self.text, self.finish_reason = self.text[: min(ends)], "stop"

    def ready(self, *, last: bool = False) -> str:
        """Return the characters not sent yet that later tokens cannot change (a half character, half a stop word)."""
        end = len(self.text)
        if not last and not self.finished:
            while end > self.sent and self.text[end - 1] == "\ufffd":
                end -= 1
            text = self.text[:end]
            end -= max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        piece, self.sent = self.text[self.sent : end], max(self.sent, end)
        return piece

    def whole(self) -> Response:
        return {
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason or "length",
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.count,
        }
