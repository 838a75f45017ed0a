"""What clients are told by Serve's proxy when nobody behind it can tell them anything."""

from __future__ import annotations

import asyncio

import pytest
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from raytx.front import Front, middlewares


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    """Do what Serve's proxy does when an ingress dies before it answers: nothing."""


async def failing(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("boom")


@pytest.mark.parametrize("app", [silent, failing])
def test_a_request_without_an_answer_is_told_to_come_back_in_its_protocols_words(app: object) -> None:
    client = TestClient(Front(app), raise_server_exceptions=False)  # type: ignore[arg-type]
    for path in ("/v1/completions", "/v2/models/echo/infer"):
        answer = client.post(path)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert isinstance(client.post("/v1/completions").json()["error"], dict)
    assert isinstance(client.post("/v2/models/echo/infer").json()["error"], str)


def test_an_answer_passes_as_it_is() -> None:
    client = TestClient(Starlette(middleware=middlewares(), routes=[]))
    assert client.get("/nowhere").status_code == 404
    assert TestClient(Front(PlainTextResponse("fine", 202))).get("/").status_code == 202


def test_an_answer_that_breaks_off_is_not_completed() -> None:
    async def half(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("boom")

    sent: list[str] = []

    async def send(message: object) -> None:
        sent.append(message["type"])  # type: ignore[index]

    with pytest.raises(RuntimeError, match="boom"):
        asyncio.run(Front(half)({"type": "http", "path": "/"}, None, send))  # type: ignore[arg-type]
    assert sent == ["http.response.start"]
