"""A run as its driver sees it: what it orders, what it shows and how it ends, without Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from ray.train import ControllerError
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.exceptions import BroadcastCollectiveTimeoutError
from rich.console import Console

from raytx import launch, status
from raytx.errors import RaytxError, ResourceError
from raytx.journal import Display


class Supervisor:
    """Takes orders as the actor does, and has records to tell."""

    def __init__(self, *records: dict[str, Any]) -> None:
        self.orders: list[str] = []
        self.records = list(records)
        self.order = SimpleNamespace(remote=self.orders.append)
        self.drain = SimpleNamespace(remote=self._drain)

    def _drain(self) -> list[dict[str, Any]]:
        records, self.records = self.records, []
        return records


@contextlib.contextmanager
def unread_console() -> Iterator[Console]:
    """Yield a console on a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as stream, contextlib.redirect_stdout(stream):  # rich has it lead nowhere
        yield Console()


def test_ctrl_c_saves_and_ends_the_run_by_its_signal_though_nobody_reads_its_output() -> None:
    supervisor = Supervisor()

    def train() -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 10
        while not supervisor.orders and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # to save
        return {"end": {"kind": "done", "step": 3}}

    with unread_console() as console:
        end, number = launch._interruptible(train, supervisor, console)
    assert end == {"end": {"kind": "done", "step": 3}}
    assert number == signal.SIGINT
    assert "stop" in supervisor.orders


def test_remarks_are_recorded_though_nobody_reads_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.ray, "get", lambda found, timeout: found)
    supervisor = Supervisor({"kind": "remark", "text": "one"}, {"kind": "remark", "text": "two"})
    with (
        unread_console() as console,
        status.recorded(tmp_path, "training"),
        Display(total_steps=3, console=console) as display,
        launch._relayed(supervisor, display, tmp_path),
    ):
        deadline = time.monotonic() + 10
        while supervisor.records and time.monotonic() < deadline:
            time.sleep(0.01)
        supervisor.records = [{"kind": "remark", "text": "three"}]
        while supervisor.records and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not supervisor.records  # the thread that takes them lives
    (turn,) = status.turns(tmp_path)
    assert [remark["text"] for remark in turn["remarks"]] == ["one", "two", "three"]


def test_a_keeper_waits_for_a_report_of_the_others_for_a_limited_time() -> None:
    with mock.patch.dict(os.environ, {"RAYTX_VERBOSE": "1"}):
        os.environ.pop("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", None)
        launch._configure()
        assert get_env_vars_to_propagate()["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] == "120"  # what workers get of Ray


# ---- how it ends


class Trainer:
    """Fails as Ray Train does."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def fit(self) -> None:
        raise self._error


def test_a_controller_that_gives_up_is_one_clear_message_with_the_cause() -> None:
    with pytest.raises(RaytxError, match=r"Ray Train gave up \(no route to head\).* goes on from the last checkpoint"):
        launch._fit(Trainer(ControllerError(OSError("no route to head"))))


def test_a_keeper_that_waited_for_others_says_for_whom_and_not_how_to_wait_longer() -> None:
    told = launch._gist(BroadcastCollectiveTimeoutError(120.0, [1], 120.0))
    assert told.endswith("have not joined the collective operation: [1]")


def test_what_a_user_can_mend_comes_out_of_the_controller_as_it_went_in() -> None:
    with pytest.raises(ResourceError, match=r"^waited 60 s$"):
        launch._fit(Trainer(ControllerError(ResourceError("waited 60 s"))))


def test_ray_train_itself_never_counts_groups_that_did_not_start(tmp_path: Path) -> None:
    plan = mock.Mock(run_dir=tmp_path)
    config = launch._run_config(plan, mock.Mock(), callbacks=())
    assert config.failure_config.controller_failure_limit == -1
