"""The HTTP application around a served model: a protocol's routes, health, and every error in the protocol's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from raytx import __version__
from raytx.errors import did_you_mean
from raytx.protocols.base import NOT_UNICODE, RequestError, Served, WireProtocol
from raytx.protocols.guard import Guard

MAX_ERRORS = 5
"""Validation errors named in one answer."""
FAILED = "the server failed on this request; its log says why (raytx serve --verbose)"


def application(
    served: Served, protocol: WireProtocol, *, key_digest: str | None = None, loopback: bool = True
) -> FastAPI:
    """Return the application; with a key's digest a token is asked for, with loopback only local names are answered."""
    app = FastAPI(title=f"raytx: {served.description.name}", version=__version__, redoc_url=None)
    app.add_middleware(
        Guard,
        protocol=protocol,
        max_body_bytes=served.settings.max_body_bytes,
        key_digest=key_digest,
        loopback=loopback,
        check_room=served.check_room,
    )
    _add_health(app, served)
    protocol.add_routes(app, served)
    _add_errors(app, protocol)
    return app


def _add_health(app: FastAPI, served: Served) -> None:
    @app.get("/healthz", tags=["health"])
    async def healthz() -> JSONResponse:
        """Answer 200 once a replica has loaded the model, 503 before."""
        ready = await served.ready()
        status = {"status": "ready" if ready else "not ready"}
        about = {"model": served.description.name, "task": served.description.task}
        return JSONResponse(status | about, 200 if ready else 503)


def _add_errors(app: FastAPI, protocol: WireProtocol) -> None:
    def answer(problem: RequestError, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(protocol.error(problem), problem.status, problem.headers | dict(headers or {}))

    async def refused(_: HttpRequest, problem: Exception) -> JSONResponse:
        assert isinstance(problem, RequestError)
        return answer(problem)

    async def invalid(_: HttpRequest, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return answer(_explained(error, protocol))

    async def http(request: HttpRequest, error: Exception) -> JSONResponse:
        assert isinstance(error, StarletteHTTPException)
        where = f": {request.method} {request.url.path}" if error.status_code in {404, 405} else ""
        return answer(RequestError(error.status_code, f"{error.detail}{where}"), error.headers)

    async def failed(_: HttpRequest, error: Exception) -> JSONResponse:
        return answer(RequestError(500, FAILED))

    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(StarletteHTTPException, http)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, failed)


def _explained(error: RequestValidationError, protocol: WireProtocol) -> RequestError:
    """Say what is wrong with a body, without repeating the body."""
    errors = error.errors()
    lines = [_line(one, protocol) for one in errors[:MAX_ERRORS]]
    if len(errors) > MAX_ERRORS:
        lines.append(f"and {len(errors) - MAX_ERRORS} more")
    return RequestError(400, "; ".join(lines), param=_path(errors[0]) or None)


def _line(error: Mapping[str, Any], protocol: WireProtocol) -> str:
    path, kind = _path(error), error["type"]
    if kind == "json_invalid":
        return f"the body is not valid JSON: {error['ctx']['error']} at character {error['loc'][-1]}"
    if kind == NOT_UNICODE:
        return str(error["msg"])
    if not path:
        return "the body must be a JSON object, sent with 'Content-Type: application/json'"
    if kind == "extra_forbidden":
        known = protocol.request.model_fields if len(error["loc"]) == 2 else ()
        return f"{path}: unknown field.{did_you_mean(path, known)}"
    return f"{path}: {error['msg']}"


def _path(error: Mapping[str, Any]) -> str:
    """Return where in the body an error is; short, for a client may name a field as it likes."""
    return "" if error["type"] == "json_invalid" else ".".join(map(str, error["loc"][1:]))[:100]
