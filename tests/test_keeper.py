"""A keeper's watch over one rank process: what it tells, what it ends, without Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time

import pytest

from raytx import pulse
from raytx.channel import Channel
from raytx.keeper import Line, Reports, Watch

GO_ON = {"over": False, "reports": 0, "dump": False, "order": {"number": 0, "kind": ""}}


class Rank:
    """A process that sleeps, a fork server that tells of its end, and a supervisor that answers as it is told to."""

    def __init__(self, directory):
        self.directory, self.answer, self.beats, self.stacks, self.records = directory, dict(GO_ON), [], [], []
        self.on_beat = lambda: None
        mine, theirs = socket.socketpair()
        self.channel = Channel(mine)
        self.process = subprocess.Popen(["sleep", "60"])
        self.watch = Watch(Channel(theirs), directory, Line(self.beat, self.stacks.append), Reports(), grace_s=0.5)
        self.channel.send({"started": self.process.pid})
        threading.Thread(target=self.reap, args=(mine,), daemon=True).start()

    def beat(self, seen, records, reports):
        self.beats.append(seen)
        self.on_beat()
        self.records.extend(records)
        return self.answer

    def reap(self, connection):
        code = self.process.wait()
        with contextlib.suppress(OSError):
            self.channel.send({"exit": code, "peak_bytes": 7 * 2**20}, after_others=True)
            connection.shutdown(socket.SHUT_RDWR)

    def soon(self, act):
        threading.Timer(0.6, act).start()


@pytest.fixture
def rank(tmp_path, monkeypatch):
    monkeypatch.setattr(pulse, "_pen", None)
    found = Rank(tmp_path)
    yield found
    found.process.kill()


def test_a_killed_process_is_told_with_its_signal_and_its_memory(rank):
    rank.soon(rank.process.kill)
    end = rank.watch.run()
    assert end.kind == "killed"
    assert "ended by SIGKILL" in end.text
    assert "peak memory 7 MiB" in end.text


def test_what_a_rank_says_of_its_end_counts_more_than_how_its_process_ends(rank):
    rank.channel.send({"done": {"step": 12}})
    rank.soon(rank.process.terminate)
    end = rank.watch.run()
    assert (end.kind, end.step) == ("done", 12)


def test_records_and_pulses_are_passed_on(rank):
    rank.channel.send({"record": {"kind": "step", "step": 1}})
    rank.channel.send({"failed": "ValueError: no", "traceback": "Traceback", "at": 5.0})
    rank.soon(rank.process.kill)
    end = rank.watch.run()
    assert rank.records == [{"kind": "step", "step": 1}]
    assert len(rank.beats) >= 2
    assert rank.beats[-1]["age_s"] > 0
    assert (end.kind, end.text, end.details, end.at) == ("failed", "ValueError: no", "Traceback", 5.0)


def test_a_process_is_ended_when_the_attempt_is_over(rank):
    rank.answer["over"] = True
    assert rank.watch.run().kind == "ended"
    assert rank.process.wait() == -signal.SIGKILL


def test_an_order_to_stop_is_passed_on_once_and_given_its_time(rank):
    pulse.begin(rank.directory / "pulse")
    pulse.phase("forward")
    rank.answer["order"] = {"number": 1, "kind": "stop"}
    started, heard = time.monotonic(), []

    def hear():
        with contextlib.suppress(EOFError, TimeoutError, OSError, ValueError):
            while True:
                heard.append(rank.channel.receive(timeout_s=2))

    threading.Thread(target=hear, daemon=True).start()
    assert rank.watch.run().kind == "ended"
    assert time.monotonic() - started >= 0.5
    assert heard == [{"number": 1, "kind": "stop"}]


def test_a_rank_that_says_much_is_watched_all_the_same(rank):
    def say():
        with contextlib.suppress(OSError):
            while True:
                rank.channel.send({"record": {"kind": "step"}})

    threading.Thread(target=say, daemon=True).start()
    rank.soon(lambda: rank.answer.update(over=True))
    assert rank.watch.run().kind == "ended"
    assert len(rank.beats) >= 2


def test_a_process_that_has_nothing_to_save_yet_is_stopped_at_once(rank):
    rank.answer["order"] = {"number": 1, "kind": "stop"}
    started = time.monotonic()
    assert rank.watch.run().kind == "ended"
    assert time.monotonic() - started < 0.5


def test_a_stopped_process_is_known_to_be_stopped(rank):
    pulse.begin(rank.directory / "pulse")
    os.kill(rank.process.pid, signal.SIGSTOP)
    os.waitpid(rank.process.pid, os.WUNTRACED)  # it stops when it is scheduled next
    rank.answer["dump"] = True
    rank.on_beat = lambda: rank.process.kill() if rank.stacks else None
    rank.watch.run()
    assert any(beat["stopped"] for beat in rank.beats)
    assert rank.stacks == ["the process is stopped (by SIGSTOP, or a debugger)"]


def test_a_rank_whose_fork_server_is_gone_is_told_as_killed(rank):
    rank.channel._socket.shutdown(socket.SHUT_RDWR)
    assert rank.watch.run().kind == "killed"
