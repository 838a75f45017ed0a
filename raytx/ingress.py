"""The HTTP side of serving: a protocol's routes over the replicas, with deadlines, 503 where requests would pile up.

It loads no model and never waits for one, so a busy model does not keep it from saying so.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from raytx.protocols import FAILED, PROTOCOLS, Description, RequestError, application, is_loopback
from raytx.sections import Serving
from raytx.tasks import Request, Response

REPLICA = "Replica"
"""Name of the deployment that holds the model."""
RETRY_AFTER_S = 1
HEALTH_AGE_S = 1.0
"""How old the answer to "is a replica running?" may be."""

T = TypeVar("T")
logger = logging.getLogger("ray.serve")


class Ingress:
    """A Ray Serve deployment; `replicas` is the handle of the one that holds the model."""

    def __init__(
        self, replicas: Any, *, description: Description, protocol: str, settings: Serving, key_digest: str | None
    ) -> None:
        self.description = description
        self.settings = settings
        self._replicas = replicas
        self._protocol = PROTOCOLS[protocol]
        self._key_digest = key_digest
        self._health = _Health()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the ASGI application; Ray Serve asks for it once the constructor is done."""
        loopback = is_loopback(self.settings.host)
        return application(self, self._protocol, key_digest=self._key_digest, loopback=loopback)

    async def predict(self, requests: Sequence[Request]) -> list[Response]:
        answer = self._replicas.predict.remote(list(requests))
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                return _or_raise(await answer)
        except (asyncio.CancelledError, TimeoutError) as error:
            answer.cancel()
            raise self._explained(error) from None
        except Exception as error:
            raise self._explained(error) from error

    async def stream(self, request: Request) -> AsyncIterator[Response]:
        pieces = self._replicas.options(stream=True).stream.remote(request)
        deadline = asyncio.get_running_loop().time() + self.settings.timeout_s
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    piece = await anext(pieces)
                yield _or_raise(piece)
        except StopAsyncIteration:
            return
        except (GeneratorExit, asyncio.CancelledError, TimeoutError) as error:
            pieces.cancel()
            raise self._explained(error) from None
        except Exception as error:
            raise self._explained(error) from error

    async def ready(self) -> bool:
        return await self._health.ready()

    def _explained(self, error: BaseException) -> BaseException:
        """Return what a client is told of an error in a replica or on the way there."""
        match error:
            case BackPressureError():
                return RequestError(503, "all replicas are busy and the queue is full", retry_after_s=RETRY_AFTER_S)
            case TimeoutError():
                limit = f"{self.settings.timeout_s:g} s (serving.timeout_s)"
                return RequestError(504, f"no answer within {limit}; the request was stopped", code="timeout")
            case RayActorError() | DeploymentUnavailableError():
                return RequestError(503, "a replica died and is being replaced", retry_after_s=RETRY_AFTER_S)
            case RequestError() | asyncio.CancelledError() | GeneratorExit():
                return error
        logger.error("a replica failed", exc_info=error)
        return RequestError(500, FAILED)


def _or_raise(value: T | RequestError) -> T:
    if isinstance(value, RequestError):
        raise value
    return value


class _Health:
    """Whether a replica runs, as the controller knows it: asking a replica would mean waiting in its queue."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._asked: float | None = None
        self._ready = False

    async def ready(self) -> bool:
        async with self._lock:
            if self._asked is None or time.monotonic() - self._asked > HEALTH_AGE_S:
                self._ready = await asyncio.to_thread(_is_running, serve.get_replica_context().app_name)
                self._asked = time.monotonic()
            return self._ready


def _is_running(app_name: str) -> bool:
    app = serve.status().applications.get(app_name)
    replicas = app and app.deployments.get(REPLICA)
    return bool(replicas) and replicas.replica_states.get("RUNNING", 0) > 0
