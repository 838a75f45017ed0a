"""OpenAI's completions API over a causal language model: /v1/models and /v1/completions, whole or streamed."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError
from starlette.responses import Response as HttpResponse

from raytx.errors import did_you_mean
from raytx.protocols.base import Body, Description, Part, RequestError, Served, WireProtocol
from raytx.sections import Serving
from raytx.tasks import Request, Response, Task

MAX_STOPS = 4
MAX_STOP_LENGTH = 64
COOLEST = 1e-3
"""Temperatures below this are taken for 0: they choose the same token, and their quotients overflow."""


def _saying(message: str) -> WrapValidator:
    """Replace the errors of every member of a union, which read like riddles, with one sentence."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("union", "{message}", {"message": message}) from None

    return WrapValidator(validate)


Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]],
    _saying("must be a string, a list of strings, a list of token ids or a list of such lists"),
]
Stop = Annotated[
    Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
    | Annotated[list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]], Field(max_length=MAX_STOPS)],
    _saying(f"must be a string, or at most {MAX_STOPS} strings, of 1 to {MAX_STOP_LENGTH} characters"),
]


class StreamOptions(Part):
    """What a streamed answer contains besides the text."""

    include_usage: bool = False
    """End with a chunk that counts tokens."""
    include_obfuscation: bool = False
    """Not supported."""


class CompletionRequest(Body):
    """A request for completions."""

    model: str
    """Name of the served model, as /v1/models lists it."""
    prompt: Prompt
    """What to continue: text or token ids, or several of them."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens to generate at most; 16 when not given."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0 takes the likeliest token, 1 (the default) samples from the model's distribution."""
    top_p: float | None = Field(None, ge=0, le=1)
    """Sample from the smallest set of tokens with this share of the probability; 1 when not given."""
    top_k: int | None = Field(None, ge=0)
    """Sample from this many of the likeliest tokens; 0 or nothing takes all. An extension to OpenAI's fields."""
    seed: int | None = None
    """Makes sampling repeatable."""
    stop: Stop | None = None
    """The answer ends before any of these."""
    stream: bool | None = None
    """Send the answer piece by piece, as server-sent events."""
    stream_options: StreamOptions | None = None
    """What a streamed answer contains besides the text."""
    user: str | None = None
    """Taken and not used."""
    n: int | None = None
    """Only 1."""
    best_of: int | None = None
    """Only 1."""
    echo: bool | None = None
    """Only false."""
    logprobs: int | None = None
    """Not supported."""
    suffix: str | None = None
    """Not supported."""
    frequency_penalty: float | None = None
    """Only 0."""
    presence_penalty: float | None = None
    """Only 0."""
    logit_bias: dict[str, float] | None = None
    """Not supported."""


ONLY: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": None,
    "suffix": None,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
}
"""Fields of OpenAI's that are known but not obeyed: any other value is refused rather than ignored."""


def add_routes(app: FastAPI, served: Served) -> None:
    """Add the routes; `served` answers for them."""

    @app.get("/v1/models", tags=["openai"])
    async def models() -> dict[str, Any]:
        """List the one model that is served."""
        return {"object": "list", "data": [_model(served.description)]}

    @app.get("/v1/models/{model}", tags=["openai"])
    async def model(model: str) -> dict[str, Any]:
        """Describe a model."""
        _check_model(model, served.description)
        return _model(served.description)

    @app.post("/v1/completions", tags=["openai"])
    async def completions(body: CompletionRequest) -> HttpResponse:
        """Continue one prompt or several."""
        requests = _requests(body, served)
        head = _head(served.description)
        if body.stream:
            return await _streamed(served, requests, body, head)
        return JSONResponse(_whole(await served.predict(requests), head))


def admit(task: Task, request: Request, settings: Serving) -> Request:
    """Turn the prompt into token ids and refuse what the model cannot take."""
    ids: list[int] = task.encode_prompt(request)  # type: ignore[attr-defined]
    size = len(task.tokenizer)
    if strange := [token for token in ids if not 0 <= token < size]:
        raise RequestError(400, f"prompt: token id {strange[0]} is not in the vocabulary of {size}", param="prompt")
    context_length: int = task.context_length  # type: ignore[attr-defined]
    if len(ids) + request["max_tokens"] > context_length:
        raise RequestError(
            400,
            f"the prompt has {len(ids)} tokens and max_tokens is {request['max_tokens']}; "
            f"together they exceed the model's context of {context_length} tokens",
            param="max_tokens" if len(ids) < context_length else "prompt",
            code="context_length_exceeded",
        )
    return request | {"prompt": ids}


def error(problem: RequestError) -> dict[str, Any]:
    """Return a problem in the shape that OpenAI's clients read."""
    kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 503: "overloaded_error"}
    default = "invalid_request_error" if problem.status < 500 else "server_error"
    name = kind.get(problem.status, default)
    return {"error": {"message": problem.message, "type": name, "param": problem.param, "code": problem.code}}


def example(description: Description) -> tuple[str, dict[str, Any]]:
    """Return path and body of a request that works."""
    return "/v1/completions", {"model": description.name, "prompt": "import os\n", "max_tokens": 32, "temperature": 0}


OPENAI = WireProtocol(add_routes=add_routes, admit=admit, error=error, request=CompletionRequest, example=example)


# ------------------------------------------------------------------------------------------------------- request


def _requests(body: CompletionRequest, served: Served) -> list[Request]:
    """Turn a body into one task request for each prompt; refuse what this server cannot do."""
    _check_model(body.model, served.description)
    _check_unsupported(body)
    prompts = _prompts(body.prompt, served.settings)
    if body.stream and len(prompts) > 1:
        raise RequestError(400, f"prompt: one prompt can be streamed at a time, not {len(prompts)}", param="prompt")
    options = _options(body, served.settings)
    return [{"prompt": prompt, **options} for prompt in prompts]


def _check_model(name: str, description: Description) -> None:
    if name != description.name:
        near = did_you_mean(name, [description.name])
        message = f"no model {name[:100]!r} here.{near} This server has {description.name!r}"
        raise RequestError(404, message, param="model", code="model_not_found")


def _check_unsupported(body: CompletionRequest) -> None:
    for name, only in ONLY.items():
        value = getattr(body, name)
        if value is not None and value != only:
            allowed = "it must be left out" if only is None else f"it can only be {json.dumps(only)}"
            raise RequestError(400, f"{name}: not supported by this server; {allowed}", param=name, code="unsupported")
    if body.stream_options is not None and not body.stream:
        raise RequestError(400, "stream_options: only with stream=true", param="stream_options")
    if body.stream_options is not None and body.stream_options.include_obfuscation:
        raise RequestError(400, "stream_options.include_obfuscation: not supported", param="stream_options")


def _prompts(prompt: str | Sequence[Any], settings: Serving) -> list[str | list[int]]:
    several = isinstance(prompt, list) and not all(isinstance(part, int) for part in prompt)
    prompts: list[Any] = list(prompt) if several else [prompt]
    if len(prompts) > settings.max_batch_size:
        message = f"prompt: {len(prompts)} prompts, {settings.max_batch_size} at most (serving.max_batch_size)"
        raise RequestError(400, message, param="prompt")
    return prompts


def _options(body: CompletionRequest, settings: Serving) -> dict[str, Any]:
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    if max_tokens > settings.max_tokens:
        message = f"max_tokens: {max_tokens} is more than the {settings.max_tokens} allowed here (serving.max_tokens)"
        raise RequestError(400, message, param="max_tokens")
    temperature = 1.0 if body.temperature is None else body.temperature
    return {
        "max_tokens": max_tokens,
        "temperature": temperature if temperature >= COOLEST else 0.0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "top_k": body.top_k or 0,
        "seed": None if body.seed is None else body.seed % 2**64,  # numpy takes no negative seeds
        "stop": [body.stop] if isinstance(body.stop, str) else list(body.stop or []),
    }


# ------------------------------------------------------------------------------------------------------ response


def _model(description: Description) -> dict[str, Any]:
    return {"id": description.name, "object": "model", "created": description.created, "owned_by": "raytx"}


def _head(description: Description) -> dict[str, Any]:
    """Return what every chunk of an answer begins with."""
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": description.name,
    }


def _whole(responses: Sequence[Response], head: dict[str, Any]) -> dict[str, Any]:
    return head | {
        "choices": [_choice(response, index) for index, response in enumerate(responses)],
        "usage": _usage(responses),
    }


def _choice(response: Response, index: int = 0) -> dict[str, Any]:
    return {"index": index, "text": response["text"], "logprobs": None, "finish_reason": response["finish_reason"]}


def _usage(responses: Sequence[Response]) -> dict[str, int]:
    prompt, completion = (sum(r[key] for r in responses) for key in ("prompt_tokens", "completion_tokens"))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _streamed(
    served: Served, requests: Sequence[Request], body: CompletionRequest, head: dict[str, Any]
) -> StreamingResponse:
    """Answer as server-sent events. The first piece is awaited before the status is sent, so that refusals have one."""
    usage = body.stream_options is not None and body.stream_options.include_usage
    pieces = served.stream(requests[0])
    first = await anext(pieces)
    return StreamingResponse(_events(first, pieces, head, usage=usage), media_type="text/event-stream")


async def _events(
    first: Response, pieces: AsyncIterator[Response], head: dict[str, Any], *, usage: bool
) -> AsyncIterator[str]:
    absent = {"usage": None} if usage else {}
    last = first
    async with aclosing(pieces):  # type: ignore[type-var]  # a client that left stops the work
        try:
            yield _event(head | {"choices": [_choice(first)]} | absent)
            async for last in pieces:
                yield _event(head | {"choices": [_choice(last)]} | absent)
        except RequestError as problem:
            yield _event(error(problem))
            return
    if usage:
        yield _event(head | {"choices": [], "usage": _usage([last])})
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
