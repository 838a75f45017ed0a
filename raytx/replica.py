"""One process that holds the model and answers admitted requests: in batches, or streamed one by one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray import serve

from raytx.artifact import open_artifact
from raytx.protocols import PROTOCOLS, RequestError
from raytx.sections import Serving
from raytx.tasks import Request, Response, Runner


class Replica:
    """A Ray Serve deployment. It returns refusals as values: what is raised, Ray logs as a failure and wraps."""

    def __init__(self, directory: str, settings: Serving) -> None:
        self._settings = settings
        self._predictor = open_artifact(directory)
        self._protocol = PROTOCOLS[self._predictor.task.protocol]
        # One thread for the batch, and one for each request that may be streamed or admitted meanwhile.
        self._threads = ThreadPoolExecutor(settings.max_ongoing_requests + 1, thread_name_prefix="raytx")
        self._batch_began: float | None = None
        self._answer.set_max_batch_size(settings.max_batch_size)
        self._answer.set_batch_wait_timeout_s(settings.batch_wait_s)

    async def check_health(self) -> None:
        """Raise when a batch is stuck: every request in it gave up long ago, and generation would have noticed."""
        limit = 2 * self._settings.timeout_s
        if self._batch_began is not None and time.monotonic() - self._batch_began > limit:
            raise RuntimeError(f"a batch has been running for more than {limit:g} s")

    async def predict(self, requests: list[Request]) -> list[Response] | RequestError:
        """Admit all requests, then answer them in whatever batches they fall into."""
        try:
            tickets = [Ticket(request) for request in await self._run(self._admit, requests)]
        except RequestError as error:
            return error
        try:
            answers = await asyncio.gather(*map(self._answer, tickets))
        finally:
            for ticket in tickets:
                ticket.wanted = False
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    async def stream(self, request: Request) -> AsyncIterator[Response | RequestError]:
        """Admit a request and answer it piece by piece, pulled in a thread."""
        try:
            [admitted] = await self._run(self._admit, [request])
        except RequestError as error:
            yield error
            return
        ticket = Ticket(admitted)
        pieces = self._predictor.task.stream(Stoppable(self._predictor.runner, [ticket]), admitted)
        try:
            while (piece := await self._run(next, pieces, None)) is not None:
                yield piece
        finally:
            ticket.wanted = False

    def _admit(self, requests: Sequence[Request]) -> list[Request]:
        return [self._protocol.admit(self._predictor.task, request, self._settings) for request in requests]

    @serve.batch  # type: ignore[untyped-decorator]  # Ray carries no types
    async def _answer(self, tickets: list[Ticket]) -> list[Response | Exception]:
        self._batch_began = time.monotonic()
        try:
            answers: list[Response | Exception] = await self._run(self._answer_all, tickets)
            return answers
        finally:
            self._batch_began = None

    def _answer_all(self, tickets: Sequence[Ticket]) -> list[Response | Exception]:
        """Answer a batch; where it fails, answer one by one, so that a request fails only by itself."""
        runner = Stoppable(self._predictor.runner, tickets)
        try:
            return list(self._predictor.task.predict(runner, [ticket.request for ticket in tickets]))
        except Exception as error:
            if len(tickets) == 1 or isinstance(error, StoppedError):
                return [error] * len(tickets)
            return [answer for ticket in tickets for answer in self._answer_all([ticket])]

    async def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)


@dataclass
class Ticket:
    """A request in a batch, and whether somebody still waits for its answer."""

    request: Request
    wanted: bool = True


class StoppedError(Exception):
    """Nobody waits for the answer any more."""


class Stoppable:
    """A runner that stops generating once nobody waits for any of a batch's answers."""

    def __init__(self, runner: Runner, tickets: Sequence[Ticket]) -> None:
        self._runner = runner
        self._tickets = tickets

    def logits(self, features: dict[str, Any]) -> np.ndarray:
        self._check()
        return self._runner.logits(features)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, np.ndarray]:
        self._check()
        return self._runner.prefill(prompts)

    def step(self, cache: Any, tokens: np.ndarray) -> tuple[Any, np.ndarray]:
        self._check()
        return self._runner.step(cache, tokens)

    def _check(self) -> None:
        if not any(ticket.wanted for ticket in self._tickets):
            raise StoppedError
