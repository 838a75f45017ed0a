"""The way of a request through the ingress, with replicas that die, are full or say nothing at chosen moments."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from raytx.ingress import Ingress
from raytx.protocols import Description, RequestError
from raytx.sections import Serving

Script = Sequence[Any]
"""What a replica does, one after the other: an exception it raises, "hang", or a value it gives."""


class Replicas:
    """Stands in for the handle: each call is answered by the next script."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.calls = 0
        self.cancelled = 0

    @property
    def predict(self) -> Replicas:
        return self

    stream = predict

    def options(self, *, stream: bool) -> Replicas:
        return self

    def remote(self, *_: Any) -> Answer:
        self.calls += 1
        return Answer(self, self.scripts.pop(0))


class Answer:
    """Stands in for what a handle returns, whole or streamed."""

    def __init__(self, replicas: Replicas, script: Script) -> None:
        self.replicas, self.script = replicas, list(script)

    def __await__(self) -> Any:
        return self._next().__await__()

    async def __anext__(self) -> Any:
        return await self._next()

    def cancel(self) -> None:
        self.replicas.cancelled += 1

    async def _next(self) -> Any:
        if not self.script:
            raise StopAsyncIteration
        act = self.script.pop(0)
        if act == "hang":
            await asyncio.sleep(60)
        if isinstance(act, Exception):
            raise act
        return act


def ingress(*scripts: Script, **settings: Any) -> tuple[Ingress, Replicas]:
    replicas = Replicas(*scripts)
    about = {"description": Description("echo", "causal-lm", "echo"), "protocol": "openai", "key_digest": None}
    return Ingress(replicas, settings=Serving(timeout_s=0.3, **settings), **about), replicas


async def pieces(stream: AsyncIterator[Any], into: list[Any]) -> None:
    async for piece in stream:
        into.append(piece)


def refusal(call: Callable[[], Coroutine[Any, Any, Any]]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        asyncio.run(call())
    return caught.value


DIED = ActorDiedError()


def test_a_request_whose_replica_dies_is_answered_by_another() -> None:
    subject, replicas = ingress([DIED], [(["fine"], 0.1)])
    assert asyncio.run(subject.predict([{}])) == ["fine"]
    assert replicas.calls == 2


def test_a_request_that_kills_two_replicas_meets_no_third() -> None:
    subject, replicas = ingress([DIED], [DIED], [(["fine"], 0.1)])
    problem = refusal(lambda: subject.predict([{}]))
    assert (problem.status, problem.retry_after_s, replicas.calls) == (503, 1, 2)


def test_the_second_attempt_ends_at_the_deadline_of_the_first() -> None:
    subject, replicas = ingress([DIED], ["hang"])
    began = time.monotonic()
    assert refusal(lambda: subject.predict([{}])).status == 504
    assert 0.25 < time.monotonic() - began < 0.6
    assert replicas.cancelled == 1


def test_a_request_that_finds_no_replica_until_its_deadline_is_told_to_come_back() -> None:
    subject, _ = ingress(["hang"])
    subject._admission.replicas = 0
    problem = refusal(lambda: subject.predict([{}]))
    assert (problem.status, problem.retry_after_s) == (503, 1)


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("boom"), 500), (BackPressureError(1, 1), 503), (RequestError(400, "no"), 400)]
)
def test_what_is_not_a_death_is_not_tried_again(error: Exception, status: int) -> None:
    subject, replicas = ingress([error], [(["fine"], 0.1)])
    assert refusal(lambda: subject.predict([{}])).status == status
    assert replicas.calls == 1


def test_a_stream_begins_again_elsewhere_only_while_nothing_of_it_was_sent() -> None:
    seen: list[Any] = []
    subject, replicas = ingress([DIED], ["a", "b"])
    asyncio.run(pieces(subject.stream({}), seen))
    assert (seen, replicas.calls) == (["a", "b"], 2)
    seen.clear()
    subject, replicas = ingress(["a", DIED], ["a", "b"])
    problem = refusal(lambda: pieces(subject.stream({}), seen))
    assert (seen, replicas.calls, problem.status) == (["a"], 1, 503)


def test_a_stream_that_falls_silent_ends_at_its_deadline() -> None:
    seen: list[Any] = []
    subject, replicas = ingress(["a", "hang"])
    assert refusal(lambda: pieces(subject.stream({}), seen)).status == 504
    assert (seen, replicas.cancelled) == (["a"], 1)


def test_every_way_out_makes_room_for_the_next() -> None:
    async def leave() -> None:
        stream = subject.stream({})
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]

    limits = {"max_batch_size": 1, "max_ongoing_requests": 1, "max_queued_requests": 1}
    subject, _ = ingress(["hang"], [DIED], [DIED], ["a", "b"], [RuntimeError("boom")], ["a", "b"], **limits)
    for call in (subject.predict, subject.predict):
        refusal(lambda: call([{}]))  # noqa: B023
    asyncio.run(leave())
    refusal(lambda: subject.predict([{}]))
    asyncio.run(pieces(subject.stream({}), []))
    assert subject._admission._requests == subject._admission._rows == 0
