"""Messages over a local socket."""

from __future__ import annotations

import socket
import threading

import pytest

from raytx.channel import CHUNK, Channel


@pytest.fixture
def ends():
    one, other = socket.socketpair()
    yield Channel(one), Channel(other)
    one.close()
    other.close()


def test_messages_arrive_in_order_and_whole_however_long(ends):
    one, other = ends
    sent = [{"text": "ä" * CHUNK, "number": 1}, {"number": 2}, {"list": [1, 2.5, None]}]
    thread = threading.Thread(target=lambda: [one.send(message) for message in sent])
    thread.start()
    assert [other.receive(timeout_s=5) for _ in sent] == sent
    thread.join()


def test_a_message_that_was_cut_short_by_a_kill_does_not_spoil_the_next(ends):
    one, other = ends
    one._socket.sendall(b'{"record": {"step": 1')
    one.send({"exit": -9}, after_others=True)
    assert other.receive(timeout_s=5) == {"exit": -9}


def test_waiting_has_a_limit(ends):
    with pytest.raises(TimeoutError):
        ends[0].receive(timeout_s=0.01)


def test_the_other_end_is_known_to_be_closed_and_what_it_sent_is_still_read(ends):
    one, other = ends
    one.send({"done": 1})
    assert not other.abandoned()
    one.close()
    assert other.abandoned()
    assert other.receive(timeout_s=5) == {"done": 1}
    with pytest.raises(EOFError):
        other.receive(timeout_s=5)
