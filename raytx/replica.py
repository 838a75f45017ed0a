"""One process that holds the model and answers admitted requests: in batches, or streamed one by one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from raytx.artifact import open_artifact
from raytx.batcher import Batcher
from raytx.protocols import PROTOCOLS, RequestError
from raytx.sections import Serving
from raytx.tasks import Request, Response, Runner


class Replica:
    """A Ray Serve deployment. It returns refusals as values: what is raised, Ray logs as a failure and wraps."""

    def __init__(self, directory: str, settings: Serving) -> None:
        self._settings = settings
        self._predictor = open_artifact(directory)
        self._protocol = PROTOCOLS[self._predictor.task.protocol]
        self._streams = asyncio.Semaphore(settings.max_ongoing_requests)
        # One thread for the batch, and one for each request that may be streamed or admitted meanwhile.
        self._threads = ThreadPoolExecutor(settings.max_ongoing_requests + 1, thread_name_prefix="raytx")
        self._watch = Watch()
        self._batches: Batcher[Ticket, Response | Exception] = Batcher(
            self._answer, max_size=settings.max_batch_size, wait_s=settings.batch_wait_s
        )

    async def check_health(self) -> None:
        """Raise when the model is stuck: Ray Serve replaces a replica that says so three times in a row."""
        if self._watch.is_overdue():
            raise RuntimeError("the model is stuck: what it works on has taken longer than any request may wait")

    async def predict(self, requests: list[Request]) -> tuple[list[Response], float] | RequestError:
        """Admit all requests, then answer them in whatever batches they fall into; the longest took so many seconds."""
        try:
            tickets = [Ticket(request) for request in await self._run(self._admit, requests)]
        except RequestError as error:
            return error
        try:
            answers = await asyncio.gather(*map(self._batches.submit, tickets))
        finally:
            for ticket in tickets:
                ticket.wanted = False
        return [_or_raise(answer) for answer in answers], max((ticket.seconds for ticket in tickets), default=0.0)

    async def stream(self, request: Request) -> AsyncIterator[Response | RequestError]:
        """Admit a request and answer it piece by piece, pulled in a thread."""
        try:
            [admitted] = await self._run(self._admit, [request])
        except RequestError as error:
            yield error
            return
        ticket = Ticket(admitted)
        pieces = self._predictor.task.stream(self._runner([ticket]), admitted)
        async with self._streams:
            try:
                while (piece := await self._run(next, pieces, None)) is not None:
                    yield piece
            finally:
                ticket.wanted = False

    def _admit(self, requests: Sequence[Request]) -> list[Request]:
        return [self._protocol.admit(self._predictor.task, request, self._settings) for request in requests]

    async def _answer(self, tickets: list[Ticket]) -> list[Response | Exception]:
        # Twice the deadline: the last request may have come when the batch was nearly over, and is answered alone.
        began = time.monotonic()
        with self._watch.over(2 * self._settings.timeout_s):
            answers: list[Response | Exception] = await self._run(self._answer_all, tickets)
        for ticket in tickets:
            ticket.seconds = time.monotonic() - began
        return answers

    def _answer_all(self, tickets: Sequence[Ticket]) -> list[Response | Exception]:
        """Answer a batch; where it fails, answer one by one, so that a request fails only by itself."""
        runner = self._runner(tickets)
        try:
            return list(self._predictor.task.predict(runner, [ticket.request for ticket in tickets]))
        except Exception as error:
            if len(tickets) == 1 or isinstance(error, StoppedError):
                return [error] * len(tickets)
            return [answer for ticket in tickets for answer in self._answer_all([ticket])]

    def _runner(self, tickets: Sequence[Ticket]) -> Stoppable:
        return Stoppable(self._predictor.runner, tickets, watch=self._watch, limit_s=self._settings.timeout_s)

    async def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)


def _or_raise(answer: Response | Exception) -> Response:
    if isinstance(answer, Exception):
        raise answer
    return answer


@dataclass
class Ticket:
    """A request in a batch, and whether somebody still waits for its answer."""

    request: Request
    wanted: bool = True
    seconds: float = 0.0
    """How long its batch took."""


class Watch:
    """What is being worked on, and by when it has to be over. Threads share it; each changes only its own entry."""

    def __init__(self) -> None:
        self._ends: dict[object, float] = {}

    @contextmanager
    def over(self, limit_s: float) -> Iterator[None]:
        work = object()
        self._ends[work] = time.monotonic() + limit_s
        try:
            yield
        finally:
            del self._ends[work]

    def is_overdue(self) -> bool:
        now = time.monotonic()
        return any(end < now for end in list(self._ends.values()))


class StoppedError(Exception):
    """Nobody waits for the answer any more."""


class Stoppable:
    """A runner that stops generating once nobody waits for any of a batch's answers, and has its passes watched."""

    def __init__(self, runner: Runner, tickets: Sequence[Ticket], *, watch: Watch, limit_s: float) -> None:
        self._runner = runner
        self._tickets = tickets
        self._watch = watch
        self._limit_s = limit_s

    def logits(self, features: dict[str, Any]) -> np.ndarray:
        with self._passing():
            return self._runner.logits(features)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, np.ndarray]:
        with self._passing():
            return self._runner.prefill(prompts)

    def step(self, cache: Any, tokens: np.ndarray) -> tuple[Any, np.ndarray]:
        with self._passing():
            return self._runner.step(cache, tokens)

    @contextmanager
    def _passing(self) -> Iterator[None]:
        if not any(ticket.wanted for ticket in self._tickets):
            raise StoppedError
        with self._watch.over(self._limit_s):
            yield
