"""The HTTP side of serving: a protocol's routes over the replicas, with deadlines, 503 where requests would pile up.

It loads no model and never waits for one, so a busy model does not keep it from saying so.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from raytx.admission import RETRY_AFTER_S, Admission
from raytx.protocols import FAILED, PROTOCOLS, Description, RequestError, application, is_loopback
from raytx.sections import Serving
from raytx.tasks import Request, Response

REPLICA = "Replica"
"""Name of the deployment that holds the model."""
ATTEMPTS = 2
"""Replicas that may die of a request before it is given up: one that kills what it meets must not meet them all."""
HEALTH_AGE_S = 1.0
"""How old the answer to "how many replicas run?" may be."""

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
        self._admission = Admission(settings)
        self._health = _Health(self._admission)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the ASGI application; Ray Serve asks for it once the constructor is done."""
        loopback = is_loopback(self.settings.host)
        return application(self, self._protocol, key_digest=self._key_digest, loopback=loopback)

    async def predict(self, requests: Sequence[Request]) -> list[Response]:
        with self._explaining(), self._admission.entry(len(requests)):
            responses, seconds = await self._ask(requests, self._deadline())
            self._admission.learn_batch(seconds)
            return responses

    async def stream(self, request: Request) -> AsyncIterator[Response]:
        with self._explaining(), self._admission.entry(1):
            began: float | None = None
            async with aclosing(self._pieces(request, self._deadline())) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    began = began or time.monotonic()
                    yield piece
            if began is not None:
                self._admission.learn_stream(time.monotonic() - began)

    async def ready(self) -> bool:
        return await self._health.running() > 0

    def check_room(self) -> None:
        self._health.refresh()
        self._admission.check()

    async def _ask(self, requests: Sequence[Request], deadline: float) -> tuple[list[Response], float]:
        """Return the answers of a replica, or of another one where it dies, and the seconds their batch took.

        To ask twice is safe: an answer depends on nothing but the request (and, sampled without a seed, on chance), and
        of an answer that was never sent nobody has seen a part.
        """
        for left in reversed(range(ATTEMPTS)):
            answer = self._replicas.predict.remote(list(requests))
            try:
                async with asyncio.timeout_at(deadline):
                    answered: tuple[list[Response], float] = _or_raise(await answer)
                    return answered
            except RayActorError:
                if not left:
                    raise
            except (asyncio.CancelledError, TimeoutError):
                answer.cancel()
                raise
        raise AssertionError("the last attempt returns or raises")

    async def _pieces(self, request: Request, deadline: float) -> AsyncIterator[Response]:
        """Yield the answer of a replica piece by piece; another one is asked only while nothing has been sent."""
        began = False
        for left in reversed(range(ATTEMPTS)):
            pieces = self._replicas.options(stream=True).stream.remote(request)
            try:
                while True:
                    async with asyncio.timeout_at(deadline):
                        piece = await anext(pieces)
                    began = True
                    yield _or_raise(piece)
            except StopAsyncIteration:
                return
            except RayActorError:
                if began or not left:
                    raise
            except (GeneratorExit, asyncio.CancelledError, TimeoutError):
                pieces.cancel()
                raise

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self.settings.timeout_s

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Turn errors in a replica or on the way there into what a client is told."""
        try:
            yield
        except (RequestError, GeneratorExit, asyncio.CancelledError):
            raise
        except TimeoutError:
            raise self._timed_out() from None
        except Exception as error:
            raise _explained(error) from error

    def _timed_out(self) -> RequestError:
        if not self._admission.replicas:
            return RequestError(503, "no replica is running; one is being started", retry_after_s=RETRY_AFTER_S)
        limit = f"{self.settings.timeout_s:g} s (serving.timeout_s)"
        return RequestError(504, f"no answer within {limit}; the request was stopped", code="timeout")


def _explained(error: Exception) -> RequestError:
    match error:
        case BackPressureError():
            return RequestError(503, "all replicas are busy and the queue is full", retry_after_s=RETRY_AFTER_S)
        case RayActorError() | DeploymentUnavailableError():
            return RequestError(503, "a replica died and is being replaced", retry_after_s=RETRY_AFTER_S)
    logger.error("a replica failed", exc_info=error)
    return RequestError(500, FAILED)


def _or_raise(value: T | RequestError) -> T:
    if isinstance(value, RequestError):
        raise value
    return value


class _Health:
    """How many replicas run, as the controller knows it: asking a replica would mean waiting in its queue."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._asked = -HEALTH_AGE_S
        self._asking: asyncio.Task[None] | None = None

    async def running(self) -> int:
        self.refresh()
        if self._asking is not None:
            await asyncio.wait({self._asking}, timeout=HEALTH_AGE_S)
        return self._admission.replicas

    def refresh(self) -> None:
        """Ask anew when the last answer has become old; wait for nothing."""
        is_asking = self._asking is not None and not self._asking.done()
        if not is_asking and time.monotonic() - self._asked > HEALTH_AGE_S:
            self._asking = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        try:
            self._admission.replicas = await asyncio.to_thread(_running, serve.get_replica_context().app_name)
        except RayActorError:  # the controller is being restarted; replicas answer without it
            logger.warning("the number of replicas is not known now")
        finally:
            self._asked = time.monotonic()


def _running(app_name: str) -> int:
    app = serve.status().applications.get(app_name)
    replicas = app and app.deployments.get(REPLICA)
    return int(replicas.replica_states.get("RUNNING", 0)) if replicas else 0
