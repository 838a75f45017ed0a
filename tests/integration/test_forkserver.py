"""Ranks that are forked warm: they train, they end with those who asked for them, and they say how they ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import prepared

from raytx import checkpoint, pulse
from raytx.channel import Channel

WAIT_S = 60


class Server:
    """A fork server, and the ranks that were asked of it."""

    def __init__(self, plan, directory, *, prelude=""):
        self.directory, self.plan, self.count = directory, plan, 0
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(directory / "s"))
            listener.listen()
            program = f"{prelude}\nfrom raytx.forkserver import main\nmain()"
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, str(listener.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=(listener.fileno(),),
                env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
            )
        self.process.stdin.write(json.dumps(plan.to_dict()).encode() + b"\n")
        self.process.stdin.flush()

    def rank(self, **values):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.directory / "s"))
        self.count += 1
        directory = self.directory / str(self.count)
        directory.mkdir()
        job = {
            "plan": self.plan.to_dict(),
            "rank": 0,
            "world_size": 1,
            "meeting_point": f"file://{directory / 'meet'}",
            "backend": "gloo",
            "timeout_s": WAIT_S,
            "directory": str(directory),
            "environment": {"RANK": "0", "LOCAL_RANK": "0"},
            "node": "here",
        }
        channel = Channel(connection)
        channel.send(job | values)
        channel.directory, channel.connection = directory, connection
        return channel

    def end(self):
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def plan(recipe):
    return prepared(recipe("forked", train__steps=100, save__every=20, save__num_to_keep=None))


@pytest.fixture(scope="module")
def server(plan, tmp_path_factory):
    found = Server(plan, tmp_path_factory.mktemp("fork"))
    yield found
    found.end()


def until(channel, wanted):
    """Return the first message that has a key, or record of that kind."""
    while True:
        message = channel.receive(timeout_s=WAIT_S)
        if wanted in message or message.get("record", {}).get("kind") == wanted:
            return message


def gone(pid):
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_a_rank_trains_tells_what_it_did_and_goes_on_after_a_kill(server, plan):
    channel = server.rank()
    pid = until(channel, "started")["started"]
    until(channel, "checkpoint")
    assert pulse.read(channel.directory / "pulse").step >= 1
    os.kill(pid, signal.SIGKILL)
    end = until(channel, "exit")
    assert end["exit"] == -signal.SIGKILL
    assert end["peak_bytes"] > 50 * 2**20
    channel = server.rank()
    assert until(channel, "resumed")["record"]["step"] >= 20
    assert until(channel, "done")["done"] == {"step": 100}
    assert until(channel, "exit")["exit"] == 0
    assert checkpoint.newest(plan.run_dir).step == 100


def test_an_order_to_stop_is_obeyed_with_a_checkpoint(server, recipe):
    run = prepared(recipe("forked-stop", train__steps=100_000, save__every=50_000))
    channel = server.rank(plan=run.to_dict())
    until(channel, "step")
    channel.send({"number": 1, "kind": "stop"})
    step = until(channel, "done")["done"]["step"]
    assert 0 < step < 100_000
    assert checkpoint.newest(run.run_dir).step == step


def test_an_order_to_save_is_obeyed_and_training_goes_on(server, recipe):
    run = prepared(recipe("forked-save", train__steps=100_000, save__every=50_000))
    channel = server.rank(plan=run.to_dict())
    until(channel, "step")
    channel.send({"number": 1, "kind": "save"})
    saved = until(channel, "checkpoint")["record"]["step"]
    assert until(channel, "step")["record"]["step"] > saved
    channel.connection.close()


def test_a_rank_ends_when_its_keeper_is_gone_even_while_it_is_stopped(server, recipe):
    run = prepared(recipe("forked-left", train__steps=100_000, save__every=50_000))
    channel = server.rank(plan=run.to_dict())
    pid = until(channel, "started")["started"]
    until(channel, "step")
    os.kill(pid, signal.SIGSTOP)
    channel.connection.close()
    assert gone(pid)


def test_stacks_are_written_when_asked_for(server, recipe):
    run = prepared(recipe("forked-stacks", train__steps=100_000, save__every=50_000))
    channel = server.rank(plan=run.to_dict())
    pid = until(channel, "started")["started"]
    until(channel, "step")
    os.kill(pid, signal.SIGUSR1)
    time.sleep(1)
    assert "worker.py" in (channel.directory / "stacks").read_text()
    os.kill(pid, signal.SIGSEGV)
    assert until(channel, "exit")["exit"] == -signal.SIGSEGV
    assert "Segmentation fault" in (channel.directory / "stacks").read_text()


def test_an_error_is_told_with_its_traceback_and_a_mistake_in_words(server, plan):
    broken = server.rank(plan={})
    told = until(broken, "failed")
    assert told["failed"].startswith("KeyError")
    assert "Traceback" in told["traceback"]
    assert until(broken, "exit")["exit"] == 1
    elsewhere = plan.to_dict() | {"plugins": {"raytx_absent": "1.0"}}
    assert "raytx_absent" in until(server.rank(plan=elsewhere), "stopped")["stopped"]


def test_without_its_owner_the_server_ends_and_so_do_its_ranks(recipe, tmp_path):
    run = prepared(recipe("forked-orphan", train__steps=100_000, save__every=50_000))
    server = Server(run, tmp_path)
    channel = server.rank()
    pid = until(channel, "started")["started"]
    until(channel, "step")
    server.process.kill()
    assert gone(pid)
    server.end()


def test_a_server_that_must_not_be_forked_starts_fresh_processes(recipe, tmp_path):
    run = prepared(recipe("forked-fresh", train__steps=4))
    thread = "import threading, time; threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()"
    server = Server(run, tmp_path, prelude=thread)
    channel = server.rank()
    pid = until(channel, "started")["started"]
    time.sleep(1)
    command = Path(f"/proc/{pid}/cmdline").read_text()
    assert until(channel, "done")["done"] == {"step": 4}
    assert "raytx.rank" in command
    server.end()
