"""Batches: as full as what waits allows, everyone gets his own answer, nobody pays for a neighbour."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from raytx.batcher import Batcher


class Model:
    """Doubles numbers, a batch in so many seconds, and remembers the batches."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.batches: list[list[int]] = []

    async def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        await asyncio.sleep(self.seconds)
        if -1 in items:
            raise ValueError("poisoned")
        return [2 * item for item in items]


def run(use: Callable[[Batcher[int, int]], Awaitable[None]], model: Model, *, wait_s: float = 0.0) -> None:
    async def main() -> None:
        await use(Batcher(model, max_size=4, wait_s=wait_s))

    asyncio.run(main())


def test_what_arrives_while_the_model_works_is_its_next_batch() -> None:
    """One every 10 ms to a model of 100 ms: batches that were closed when their first item came would hold one each."""

    async def use(batcher: Batcher[int, int]) -> None:
        tasks = []
        for number in range(20):
            tasks.append(asyncio.create_task(batcher.submit(number)))
            await asyncio.sleep(0.01)
        assert await asyncio.gather(*tasks) == [2 * number for number in range(20)]

    model = Model(0.1)
    run(use, model)
    assert [len(batch) for batch in model.batches[:4]] == [1, 4, 4, 4]
    assert [number for batch in model.batches for number in batch] == list(range(20))


def test_a_batch_waits_for_others_but_not_once_it_is_full() -> None:
    async def use(batcher: Batcher[int, int]) -> None:
        first = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0.02)
        async with asyncio.timeout(1):
            await asyncio.gather(first, batcher.submit(2), batcher.submit(3), batcher.submit(4))

    model = Model()
    run(use, model, wait_s=30)
    assert model.batches == [[1, 2, 3, 4]]


def test_who_gave_up_takes_no_place_in_a_batch() -> None:
    async def use(batcher: Batcher[int, int]) -> None:
        running = asyncio.create_task(batcher.submit(0))
        await asyncio.sleep(0.02)
        waiting = [asyncio.create_task(batcher.submit(number)) for number in (1, 2, 3)]
        await asyncio.sleep(0)
        waiting[1].cancel()
        running.cancel()
        await asyncio.wait(waiting)
        assert (waiting[0].result(), waiting[2].result()) == (2, 6)

    model = Model(0.1)
    run(use, model)
    assert model.batches == [[0], [1, 3]]


def test_a_failure_reaches_all_of_its_batch_and_none_of_the_next() -> None:
    async def use(batcher: Batcher[int, int]) -> None:
        found = await asyncio.gather(*map(batcher.submit, [1, -1, 3, 4, 5]), return_exceptions=True)
        assert [type(value) for value in found] == [ValueError] * 4 + [int]
        assert await batcher.submit(7) == 14

    run(use, Model())
