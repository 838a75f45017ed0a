"""Keepers that meet at the supervisor: whom it lets begin, and whom it sends away, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from raytx.supervisor import Supervisor

PLACE = {"address": "127.0.0.1", "node_id": "a", "port": 1, "keeper": None}
TOLD_TO_END = {"attempt": 0, "ordered": True}


@pytest.fixture
def supervisor() -> Any:
    """What the actor is made of."""
    settings = {"max_failures": 3, "stall_s": 30.0, "local": False}
    return Supervisor.__ray_metadata__.modified_class(settings)  # type: ignore[attr-defined]


def within(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, timeout=5))


def test_keepers_begin_when_all_have_come(supervisor: Any) -> None:
    async def both() -> list[dict[str, Any]]:
        return await asyncio.gather(*(supervisor.join("1", rank, 2, PLACE) for rank in range(2)))

    assert [begun["attempt"] for begun in within(both())] == [1, 1]


def test_who_waits_for_the_others_is_sent_home_when_the_run_is_told_to_end(supervisor: Any) -> None:
    async def one_then_the_order_then_the_other() -> tuple[Any, Any]:
        waiting = asyncio.create_task(supervisor.join("1", 0, 2, PLACE))
        await asyncio.sleep(0.1)
        await supervisor.order("stop")
        return await waiting, await supervisor.join("1", 1, 2, PLACE)

    assert within(one_then_the_order_then_the_other()) == (TOLD_TO_END, TOLD_TO_END)


def test_a_keeper_that_was_cut_off_takes_nobodys_place_in_the_group_after_its_own(supervisor: Any) -> None:
    async def late() -> tuple[Any, bool]:
        new = asyncio.create_task(supervisor.join("2", 0, 2, PLACE))
        await asyncio.sleep(0.1)
        old = await supervisor.join("1", 1, 2, PLACE)
        await asyncio.sleep(0.1)
        begun = new.done()
        new.cancel()
        return old, begun

    assert within(late()) == ({"attempt": 0, "ordered": False}, False)


def test_what_ends_a_run_that_was_told_to_end_brings_no_other_attempt(supervisor: Any) -> None:
    async def ended() -> tuple[Any, Any]:
        await supervisor.join("1", 0, 1, PLACE)
        await supervisor.order("stop")
        verdict = await supervisor.ended("1", 1, 0, {"kind": "ended"}, 0)
        return verdict["again"], await supervisor.join("1", 0, 1, PLACE)

    assert within(ended()) == (True, TOLD_TO_END)
    assert supervisor._records == []
