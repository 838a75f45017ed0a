"""What every wire protocol is made of: routes over a served model, admission of requests, a shape for errors."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from raytx.sections import Serving
from raytx.tasks import Request, Response, Task

NOT_UNICODE = "not_unicode"
"""Type of the validation error that `Body` raises."""


class RequestError(Exception):
    """A refusal or failure that the client is told of, in its protocol's own shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(status, message)  # what pickle rebuilds it from
        self.status = status
        self.message = message
        self.param = param
        """The field of the request that is to blame."""
        self.code = code
        """A short name of the problem, for programs."""
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


@dataclass(frozen=True)
class Description:
    """What clients are told of the served model."""

    name: str
    task: str
    format: str
    """Type of the export component."""
    labels: tuple[str, ...] | None = None
    created: int = 0
    """When the artifact was published, in seconds since 1970."""


class Served(Protocol):
    """The model behind the routes. All methods raise RequestError, and nothing else, for what goes wrong."""

    description: Description
    settings: Serving

    async def predict(self, requests: Sequence[Request]) -> list[Response]:
        """Answer requests, in their order; all are admitted before any is worked on."""

    def stream(self, request: Request) -> AsyncIterator[Response]:
        """Answer one request piece by piece; closing the iterator stops the work."""

    async def ready(self) -> bool:
        """Tell whether a replica has loaded the model."""

    def check_room(self) -> None:
        """Raise when any request would be refused now: asked before a body is read."""


@dataclass(frozen=True)
class WireProtocol:
    """How one kind of task is spoken to over HTTP."""

    add_routes: Callable[[FastAPI, Served], None]
    """Add the protocol's routes to an application."""
    admit: Callable[[Task, Request, Serving], Request]
    """Check a request beside the processor, before it joins a batch; return what the task takes, or raise."""
    error: Callable[[RequestError], dict[str, Any]]
    """Return the JSON body of a problem."""
    request: type[Body]
    """The body of the protocol's main route."""
    example: Callable[[Description], tuple[str, dict[str, Any]]]
    """Return path and body of a request that works."""


class Part(BaseModel):
    """A part of a request body: no coercion of types, no NaN, and no field that is silently ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Body(Part):
    """A request body. JSON can spell half of a surrogate pair, which no tokenizer takes and no answer can repeat."""

    @model_validator(mode="before")
    @classmethod
    def _is_unicode(cls, value: Any) -> Any:
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except (UnicodeEncodeError, RecursionError):
            raise PydanticCustomError(NOT_UNICODE, "the body is not valid Unicode, or nested too deeply") from None
        return value
