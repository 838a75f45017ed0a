"""What a request must pass before a route sees it: the right host, the right token, room, a body of bounded size."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raytx.protocols.base import RequestError, WireProtocol

OPEN_PATHS = frozenset({"/healthz"})
"""Paths that need no token: probes of schedulers have none, and the answer tells only what is served."""


class Guard:
    """ASGI middleware. Plain ASGI, because it must not come between a streamed answer and its client."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        protocol: WireProtocol,
        max_body_bytes: int,
        key_digest: str | None,
        loopback: bool,
        check_room: Callable[[], None],
    ) -> None:
        self.app = app
        self.protocol = protocol
        self.max_body_bytes = max_body_bytes
        self.key_digest = key_digest
        self.loopback = loopback
        self.check_room = check_room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
            if scope["method"] == "POST":  # all others only describe
                self.check_room()
            receive = await self._body(scope, receive)
        except RequestError as problem:
            answer = JSONResponse(self.protocol.error(problem), problem.status, problem.headers)
            await answer(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self.loopback and not is_loopback(_hostname(headers.get("host", ""))):
            # A page elsewhere can point its own name at 127.0.0.1 and so read answers meant for this machine only.
            raise RequestError(403, "this server answers only to the names localhost and 127.0.0.1", code="bad_host")
        if self.key_digest is not None and scope["path"] not in OPEN_PATHS:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key_digest(key.strip()), self.key_digest):
                raise RequestError(
                    401, "send the server's API key as 'Authorization: Bearer ...'", code="invalid_api_key"
                )

    async def _body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body, at most as much as is allowed; return a receive that gives it back in one piece."""
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_body_bytes:
            raise self._too_large()
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the client has gone
                break
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_body_bytes:
                raise self._too_large()
        waiting: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        return replay

    def _too_large(self) -> RequestError:
        return RequestError(
            413, f"the body is larger than {self.max_body_bytes:,} bytes (serving.max_body_bytes)", code="too_large"
        )


def key_digest(key: str) -> str:
    """Return what is kept of an API key: enough to recognise it, not enough to use it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address means this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _hostname(header: str) -> str:
    """Return the host of a Host header, without port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]
