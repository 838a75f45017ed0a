"""Keepers that meet at the supervisor: whom it lets begin, and whom it sends away, without Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytx import launch, ray_internals, supervision
from raytx import supervisor as module
from raytx.errors import RaytxError
from raytx.pulse import Pulse
from raytx.supervision import End
from raytx.supervisor import Supervisor

PLACE = {"address": "127.0.0.1", "node_id": "a", "port": 1, "keeper": None}
TOLD_TO_END = {"attempt": 0, "ordered": True}


def made(run_dir: Path, **changes: Any) -> Any:
    """What the actor is made of."""
    usual = {"max_failures": 3, "stall_s": 30.0, "grace_s": 0.3, "local": False, "resources": {"CPU": 1.0}}
    settings = usual | {"run_dir": str(run_dir)} | changes
    return Supervisor.__ray_metadata__.modified_class(settings)  # type: ignore[attr-defined]


@pytest.fixture
def supervisor(tmp_path: Path) -> Any:
    return made(tmp_path)


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


async def begun(supervisor: Any, world_size: int = 2) -> None:
    """Have the first attempt of a group begin."""
    await asyncio.gather(*(supervisor.join("1", rank, world_size, PLACE) for rank in range(world_size)))


def final_error(verdict: Any) -> str:
    """Return what a run without a restart says that ends so."""
    plan: Any = SimpleNamespace(steps=9, recipe=SimpleNamespace(scaling=SimpleNamespace(max_failures=0)))
    with pytest.raises(RaytxError) as told:
        launch._judge(verdict, plan, None)
    return str(told.value)


def test_the_final_error_names_the_rank_that_was_missing(tmp_path: Path) -> None:
    supervisor = made(tmp_path, max_failures=0)

    async def stalled() -> Any:
        await begun(supervisor)
        for rank in range(2):
            await supervisor.beat("1", 1, rank, asdict(Pulse(5, 3, "forward", 40.0 + rank, 0.1)), [], 0)
        looking = asyncio.create_task(supervisor._look())
        await asyncio.sleep(0.1)
        await asyncio.gather(*(supervisor.dumped("1", 1, rank, "") for rank in range(2)))
        await looking
        return await asyncio.gather(*(supervisor.ended("1", 1, rank, {"kind": "ended"}, 0) for rank in range(2)))

    error = final_error(within(stalled())[0])
    assert error.startswith("rank 1 failed")
    assert "The first cause:\nrank 1 is missing: nobody has made progress" in error


def test_the_final_error_names_the_rank_whose_worker_was_lost(tmp_path: Path) -> None:
    supervisor = made(tmp_path, max_failures=0)

    async def lost() -> Any:
        await supervisor.lost("the worker of rank 1 failed (its process died)", rank=1)
        return await supervisor.join("1", 0, 2, PLACE)

    assert final_error(within(lost())["verdict"]).startswith("rank 1 failed")


@pytest.mark.parametrize(("group", "given_up"), [("1", ["keeper 1"]), ("2", [])])
def test_a_keeper_that_stops_between_two_attempts_is_ended_unless_others_are_in_its_place(
    supervisor: Any, monkeypatch: pytest.MonkeyPatch, group: str, given_up: list[str]
) -> None:
    killed: list[str] = []
    monkeypatch.setattr(module.ray, "kill", killed.append)
    monkeypatch.setattr(supervision, "OVERDUE_S", 0.0)
    monkeypatch.setattr(module.ray_internals, "draining_nodes", dict)

    async def one_comes_back() -> None:
        places = [{**PLACE, "keeper": f"keeper {rank}"} for rank in range(2)]
        await asyncio.gather(*(supervisor.join("1", rank, 2, places[rank]) for rank in range(2)))
        await asyncio.gather(*(supervisor.ended("1", 1, rank, {"kind": "killed"}, 0) for rank in range(2)))
        back = asyncio.create_task(supervisor.join(group, 0, 2, places[0]))
        await asyncio.sleep(0.1)
        await supervisor._look()
        back.cancel()

    within(one_comes_back())
    assert killed == given_up


STALL = End("killed", "rank 0 is missing", details="rank 0 is missing")


async def remarks(supervisor: Any) -> list[str]:
    return [record["text"] for record in await supervisor.drain()]


async def stalled(supervisor: Any) -> None:
    """Have an attempt of one rank stall."""
    looking = asyncio.create_task(supervisor._end_stalled(0, STALL))
    await asyncio.sleep(0.1)
    await supervisor.dumped("1", 1, 0, "Thread (most recent call first):\n  File train.py")
    await looking


def test_a_stall_is_told_and_ended_while_the_runs_disk_does_not_answer(
    supervisor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, answered = threading.Event(), []
    monkeypatch.setattr(module, "write_text", lambda path, text: answered.append(answers.wait(timeout=2)))

    async def on_a_disk_that_hangs() -> tuple[Any, list[str], list[str]]:
        await begun(supervisor, 1)
        await stalled(supervisor)
        told = await supervisor.beat("1", 1, 0, asdict(Pulse()), [], 0)
        before = await remarks(supervisor)
        answers.set()
        await supervisor._last_stacks
        return told["over"], before, await remarks(supervisor)

    over, before, after = within(on_a_disk_that_hangs())
    assert over
    assert before == ["rank 0 is missing. Every rank's stack:", "rank 0: File train.py"]
    assert answered == [True], "nobody else could go on before the disk answered"
    assert "the stacks in full are in" in after[0]


def test_stacks_that_cannot_be_written_are_not_said_to_be_there(tmp_path: Path) -> None:
    supervisor = made(tmp_path / "gone")

    async def without_a_disk() -> list[str]:
        await begun(supervisor, 1)
        await stalled(supervisor)
        await supervisor._last_stacks
        return await remarks(supervisor)

    *_, last = within(without_a_disk())
    assert "the stacks cannot be written: [Errno 2] No such file or directory" in last


def test_ranks_of_one_machine_meet_beside_their_keepers_and_not_in_the_runs_directory(tmp_path: Path) -> None:
    supervisor = made(tmp_path / "gone", local=True)
    begun = within(supervisor.join("1", 0, 1, {**PLACE, "directory": str(tmp_path / "rank-0")}))
    assert begun["meeting_point"].startswith(f"file://{tmp_path}/rank-0/")
    assert not (tmp_path / "gone").exists()


def test_a_rank_that_dies_while_stacks_are_collected_is_the_cause(supervisor: Any) -> None:
    async def killed_meanwhile() -> tuple[Any, list[str]]:
        await begun(supervisor)
        looking = asyncio.create_task(supervisor._end_stalled(0, STALL))
        await asyncio.sleep(0.1)
        ends = [("killed", "was ended by SIGKILL"), ("ended", "")]
        told = [supervisor.ended("1", 1, rank, {"kind": k, "text": t}, 0) for rank, (k, t) in enumerate(ends)]
        verdict, _ = await asyncio.gather(*told)
        await asyncio.wait_for(looking, timeout=1)
        return verdict, await remarks(supervisor)

    verdict, told = within(killed_meanwhile())
    assert verdict["end"]["text"] == "was ended by SIGKILL"
    assert told == ["rank 0 was ended by SIGKILL; starting anew from the last checkpoint (restart 1 of at most 3)"]


def test_an_attempt_that_begins_while_stacks_are_collected_is_left_alone(supervisor: Any) -> None:
    async def begun_anew_meanwhile() -> tuple[Any, list[str]]:
        await begun(supervisor)
        looking = asyncio.create_task(supervisor._end_stalled(0, STALL))
        await asyncio.sleep(0.1)
        await supervisor.lost("the worker of rank 1 failed (its process died)", rank=1)
        await asyncio.gather(*(supervisor.join("2", rank, 2, PLACE) for rank in range(2)))
        await asyncio.wait_for(looking, timeout=1)
        told = await supervisor.beat("2", 2, 0, asdict(Pulse()), [], 0)
        return told, await remarks(supervisor)

    told, said = within(begun_anew_meanwhile())
    assert not told["over"]
    assert not told["dump"]
    assert said == ["the worker of rank 1 failed (its process died); replacing the workers (restart 1 of at most 3)"]


def test_a_run_that_was_told_to_end_ends_so_whatever_was_lost_before(tmp_path: Path) -> None:
    supervisor = made(tmp_path, max_failures=0)

    async def lost_then_told() -> Any:
        await supervisor.lost("the worker of rank 0 failed (its process died)", rank=0)
        await supervisor.order("stop")
        return await supervisor.join("1", 0, 1, PLACE)

    assert within(lost_then_told()) == TOLD_TO_END


# ---- a resize of healthy workers


async def resized(supervisor: Any, *, saves_after_s: float) -> tuple[bool, list[str]]:
    """Resize a run of one rank whose save takes so long; return whether it had saved, and what was said."""
    await begun(supervisor, 1)
    await supervisor.beat("1", 1, 0, asdict(Pulse(step=7)), [], 0)
    resize = asyncio.create_task(supervisor.resize())
    await asyncio.wait([resize], timeout=saves_after_s)
    committed = {"kind": "checkpoint", "step": 7}
    await supervisor.beat("1", 1, 0, asdict(Pulse(step=8)), [committed], 0)
    return await resize, [record["text"] for record in supervisor._records if record["kind"] == "remark"]


@pytest.fixture
def draining(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The nodes that are about to go, and when."""
    nodes: dict[str, float] = {}
    monkeypatch.setattr(ray_internals, "available_resources_per_node", dict)
    monkeypatch.setattr(ray_internals, "draining_nodes", lambda: nodes)
    return nodes


def test_growth_waits_for_a_save_that_takes_longer_than_the_grace(supervisor: Any, draining: dict[str, float]) -> None:
    draining["b"] = 1.0  # where no rank is
    assert within(resized(supervisor, saves_after_s=1.0)) == (True, [])


def test_a_drained_node_is_left_after_the_grace_and_what_that_costs_is_said(
    supervisor: Any, draining: dict[str, float]
) -> None:
    draining["a"] = 1.0
    saved, remarks = within(resized(supervisor, saves_after_s=1.0))
    assert not saved
    assert "no checkpoint within 0.3 s before the resize; steps since the last are done again" in remarks


def test_a_resize_waits_for_nothing_once_the_attempt_is_over(supervisor: Any, draining: dict[str, float]) -> None:
    async def over() -> bool:
        await begun(supervisor, 1)
        await supervisor.beat("1", 1, 0, asdict(Pulse(step=7)), [], 0)
        resize = asyncio.create_task(supervisor.resize())
        await asyncio.sleep(0.2)
        supervisor._state.attempt.over = True  # as where its only keeper does not answer, which tells nobody
        return bool(await resize)

    assert not within(over())
