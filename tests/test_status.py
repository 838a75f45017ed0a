"""Who holds a run is seen without getting in its way, and how each command ended is on record."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from raytx import run, status
from raytx.errors import DataError, ResourceError, StoppedError

HOLD = """
import sys, time
from pathlib import Path
from raytx import run
with run.at_work(Path(sys.argv[1]), "training"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_that_nobody_holds_has_no_holder(tmp_path: Path) -> None:
    assert status.holder(tmp_path) is None
    with run.at_work(tmp_path, "training"):
        pass
    assert status.holder(tmp_path) is None


def test_the_holder_is_told_with_its_host_and_process(tmp_path: Path) -> None:
    with run.at_work(tmp_path, "exporting"):
        owner = status.holder(tmp_path)
    assert owner is not None
    assert (owner["host"], owner["pid"], owner["doing"]) == (socket.gethostname(), os.getpid(), "exporting")


def test_a_second_owner_is_told_who_the_first_is(tmp_path: Path) -> None:
    with (
        run.at_work(tmp_path, "training"),
        pytest.raises(ResourceError, match=rf"in use by another process \(training, pid {os.getpid()} on "),
        run.lock(tmp_path, doing="training"),
    ):
        pass


def test_looking_at_a_run_never_keeps_anybody_from_taking_it(tmp_path: Path) -> None:
    done = threading.Event()
    status_dir = tmp_path / "r"
    with run.lock(status_dir, doing="training"):
        pass

    def look() -> None:
        while not done.is_set():
            status.holder(status_dir)

    lookers = [threading.Thread(target=look) for _ in range(4)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(50):
            with run.lock(status_dir, doing="training"):
                pass
    finally:
        done.set()
        for looker in lookers:
            looker.join()


def test_how_a_command_ended_is_on_record(tmp_path: Path) -> None:
    with run.at_work(tmp_path, "training"):
        status.remark(tmp_path, "worker 1 failed")
    with pytest.raises(DataError), run.at_work(tmp_path, "training"):
        raise DataError("no rows")
    with pytest.raises(KeyboardInterrupt), run.at_work(tmp_path, "training"):
        raise KeyboardInterrupt
    with pytest.raises(StoppedError), run.at_work(tmp_path, "training"):
        raise StoppedError("stopped by SIGTERM at step 3", exit_code=143)
    with pytest.raises(ZeroDivisionError), run.at_work(tmp_path, "training"):
        print(1 / 0)
    turns = status.turns(tmp_path)
    assert [turn["error"] for turn in turns] == [
        None, "no rows", "interrupted", "interrupted", "ZeroDivisionError: division by zero",
    ]  # fmt: skip
    assert [remark["text"] for remark in turns[0]["remarks"]] == ["worker 1 failed"]
    assert all(turn["started"] <= turn["ended"] <= time.time() for turn in turns)


def test_a_killed_command_leaves_a_turn_without_an_end_and_no_holder(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        owner = status.holder(tmp_path)
        assert owner is not None
        assert owner["pid"] == process.pid
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert status.holder(tmp_path) is None
    (turn,) = status.turns(tmp_path)
    assert (turn["pid"], "ended" in turn) == (process.pid, False)


def test_the_record_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "TURNS_KEPT", 3)
    monkeypatch.setattr(status, "REMARKS_KEPT", 2)
    for _ in range(5):
        with run.at_work(tmp_path, "training"):
            for text in "abc":
                status.remark(tmp_path, text)
    turns = status.turns(tmp_path)
    assert len(turns) == 3
    assert [remark["text"] for remark in turns[-1]["remarks"]] == ["b", "c"]


def test_a_record_that_cannot_be_read_or_written_keeps_nobody_from_working(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for content in ("{", "[]", json.dumps({"turns": 3}), json.dumps({"turns": [3]})):
        (tmp_path / status.STATUS).write_text(content)
        assert status.turns(tmp_path) == []

    def full(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(status, "write_json", full)
    with run.at_work(tmp_path, "training"):
        status.remark(tmp_path, "still here")
