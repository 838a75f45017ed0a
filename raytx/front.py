"""What Ray Serve's HTTP proxy runs before an application: an answer when the ingress died and Serve would give none."""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raytx.admission import RETRY_AFTER_S
from raytx.protocols import OPEN_INFERENCE, OPENAI, RequestError


def middlewares() -> list[Middleware]:
    """Return what the proxy runs; RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names this function."""
    return [Middleware(Front)]


class Front:
    """ASGI middleware. Without it the client of an ingress that died gets 500 as if its request were to blame.

    An answer that had begun is left as it is: the proxy closes the connection, so its client sees that the end is
    missing.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception:
            if begun:
                raise
        if not begun:
            await _unavailable(scope["path"])(scope, receive, send)


def _unavailable(path: str) -> JSONResponse:
    problem = RequestError(503, "the server is being replaced", retry_after_s=RETRY_AFTER_S)
    protocol = OPEN_INFERENCE if path.startswith("/v2") else OPENAI
    return JSONResponse(protocol.error(problem), problem.status, problem.headers)
