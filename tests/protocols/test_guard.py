"""What a request must pass before a route sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
from fastapi.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from raytx.protocols import PROTOCOLS, is_loopback, key_digest
from raytx.protocols.guard import Guard

Make = Callable[..., TestClient]
URL = "/v1/completions"
JSON = {"content-type": "application/json"}


def padded(size: int) -> bytes:
    """Return a valid body of a size in bytes."""
    body = b'{"model": "echo", "prompt": "a", "max_tokens": 1}'
    return body + b" " * (size - len(body))


def in_pieces(body: bytes) -> Iterator[bytes]:
    """Yield a body in pieces; sent this way it is chunked and has no content-length."""
    yield from (body[start : start + 100] for start in range(0, len(body), 100))


def test_a_body_of_just_the_allowed_size_passes(client: Make) -> None:
    made = client("causal-lm", max_body_bytes=1000)
    assert made.post(URL, content=padded(1000), headers=JSON).status_code == 200
    assert made.post(URL, content=in_pieces(padded(1000)), headers=JSON).status_code == 200


def test_a_byte_more_is_413_whether_its_length_is_declared_or_not(client: Make) -> None:
    made = client("causal-lm", max_body_bytes=1000)
    for content in (padded(1001), in_pieces(padded(1001))):
        answer = made.post(URL, content=content, headers=JSON)
        assert answer.status_code == 413
        assert "1,000 bytes" in answer.json()["error"]["message"]


def test_no_more_of_an_endless_body_is_read_than_shows_it_is_too_large() -> None:
    read, sent = 0, []

    async def receive() -> Message:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": b" " * 100, "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("the application was reached")

    options = {"max_body_bytes": 1000, "key_digest": None, "loopback": False, "check_room": lambda: None}
    guard = Guard(never, protocol=PROTOCOLS["openai"], **options)
    asyncio.run(guard({"type": "http", "path": URL, "method": "POST", "headers": []}, receive, send))
    assert sent[0]["status"] == 413
    assert read == 11


def test_a_full_server_refuses_before_it_reads_a_body_and_still_describes_itself(client: Make) -> None:
    made = client("causal-lm", key_digest=key_digest("sesame"))
    made.served.has_room = False  # type: ignore[attr-defined]
    assert made.post(URL, content=b"{", headers=JSON).status_code == 401
    headers = {"authorization": "Bearer sesame"}
    answer = made.post(URL, content=b"{", headers=JSON | headers)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["type"] == "overloaded_error"
    assert made.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LOCALHOST:80", "[::1]:8000", "127.1.2.3"])
def test_local_names_are_answered(client: Make, host: str) -> None:
    assert client("causal-lm").get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "192.168.0.2", ""])
def test_other_names_are_refused_on_loopback_even_for_health(client: Make, host: str) -> None:
    for path in ("/v1/models", "/healthz"):
        answer = client("causal-lm").get(path, headers={"host": host})
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "bad_host"


def test_a_server_for_others_answers_to_any_name(client: Make) -> None:
    made = client("causal-lm", loopback=False)
    assert made.get("/v1/models", headers={"host": "model.example"}).status_code == 200


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", "Basic sesame", "sesame", "Bearer sésame"])
def test_without_the_key_only_health_is_told(client: Make, header: str | None) -> None:
    made = client("causal-lm", key_digest=key_digest("sesame"))
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    for path in ("/v1/models", "/docs", "/openapi.json", "/nowhere", "/healthz/"):
        assert made.get(path, headers=headers).status_code == 401, path
    assert made.post(URL, json={"model": "echo", "prompt": "a"}, headers=headers).status_code == 401
    assert made.get("/healthz").status_code == 200


@pytest.mark.parametrize("header", ["Bearer sesame", "bearer sesame"])
def test_with_the_key_all_is_answered(client: Make, header: str) -> None:
    made = client("causal-lm", key_digest=key_digest("sesame"))
    assert made.get("/v1/models", headers={"authorization": header}).status_code == 200


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("example.org", False),
    ],
)
def test_loopback_is_told_from_the_rest(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
