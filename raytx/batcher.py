"""Requests become batches: those that wait while the model works are its next batch.

Ray Serve's own `serve.batch` closes a batch after its waiting time though the one before still runs: under load with a
short waiting time its batches hold one request each (measured with 2.60: 3 requests/s where batches of 8 give 25).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Batcher(Generic[Item, Answer]):
    """Answers items in batches of at most `max_size`, one batch at a time. One event loop uses it.

    An item waits for others for `wait_s` seconds at most, the time that it waited for the model included.
    """

    def __init__(
        self, answer: Callable[[list[Item]], Awaitable[Sequence[Answer]]], *, max_size: int, wait_s: float
    ) -> None:
        self._answer = answer
        self._max_size = max_size
        self._wait_s = wait_s
        self._waiting: deque[tuple[Item, float, asyncio.Future[Answer]]] = deque()
        self._arrived = asyncio.Event()
        self._work: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Answer:
        """Return the answer to an item. An item whose caller gives up before its batch begins is left out of it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((item, loop.time(), future))
        self._arrived.set()
        if self._work is None or self._work.done():
            self._work = loop.create_task(self._run())
        return await future

    async def _run(self) -> None:
        while self._waiting:
            await self._fill()
            taken = [self._waiting.popleft() for _ in range(min(self._max_size, len(self._waiting)))]
            batch = [(item, future) for item, _, future in taken if not future.done()]
            if batch:
                await self._finish(*map(list, zip(*batch, strict=True)))

    async def _fill(self) -> None:
        """Wait until a batch is full, or its first item has waited long enough."""
        _, since, _ = self._waiting[0]
        with suppress(TimeoutError):
            async with asyncio.timeout_at(since + self._wait_s):
                while len(self._waiting) < self._max_size:
                    self._arrived.clear()
                    await self._arrived.wait()

    async def _finish(self, items: list[Item], futures: list[asyncio.Future[Answer]]) -> None:
        try:
            answers = await self._answer(items)
            assert len(answers) == len(items), f"{len(answers)} answers to {len(items)} requests"
        except Exception as error:
            for future in futures:
                if not future.done():
                    future.set_exception(error)
            return
        for future, answer in zip(futures, answers, strict=True):
            if not future.done():  # its caller may have given up meanwhile
                future.set_result(answer)
