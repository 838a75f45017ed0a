"""Who is let in: as many as there are places for, and only whom an answer would reach in time."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from raytx.admission import Admission
from raytx.protocols import RequestError
from raytx.sections import Serving


def admission(**settings: Any) -> Admission:
    chosen = {"num_replicas": 1, "max_batch_size": 4, "max_ongoing_requests": 4, "max_queued_requests": 100}
    return Admission(Serving(**chosen | settings))


def let_in(subject: Admission, *, rows: int = 1, at_most: int = 1000) -> int:
    """Return how many requests are let in before one is refused."""
    with ExitStack() as inside:
        for count in range(at_most):
            try:
                inside.enter_context(subject.entry(rows))
            except RequestError:
                return count
    return at_most


def test_no_more_are_let_in_than_replicas_and_queue_hold_and_each_makes_room_when_it_leaves() -> None:
    subject = admission(num_replicas=2, max_queued_requests=3)
    assert [let_in(subject), let_in(subject)] == [11, 11]


def test_a_refusal_says_when_to_come_back() -> None:
    subject = admission(max_queued_requests=1)
    with ExitStack() as inside:
        for _ in range(5):
            inside.enter_context(subject.entry(1))
        with pytest.raises(RequestError) as caught:
            subject.check()
    assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "1"})


def test_who_fails_inside_makes_room_as_well() -> None:
    subject = admission(max_queued_requests=1)
    for _ in range(20):
        with pytest.raises(ValueError, match="inside"), subject.entry(1):
            raise ValueError("inside")
    assert let_in(subject) == 5


def test_nobody_is_let_in_to_wait_past_the_deadline() -> None:
    """Batches of four in 2 s: the row that finds 16 ahead waits 8 s and is answered after 10."""
    subject = admission(timeout_s=10)
    subject.learn_batch(2.0)
    assert let_in(subject) == 17
    assert let_in(subject, rows=4) == 5


def test_a_longest_wait_of_ones_own_is_kept() -> None:
    subject = admission(timeout_s=10, max_wait_s=3)
    subject.learn_batch(2.0)
    assert let_in(subject) == 7


def test_a_replica_with_room_for_a_batch_is_asked_however_slow_it_was() -> None:
    subject = admission(timeout_s=10, max_wait_s=0.1)
    subject.learn_batch(1000.0)
    assert let_in(subject) == 4


def test_a_faster_model_is_believed_after_a_few_answers() -> None:
    subject = admission(timeout_s=10)
    subject.learn_batch(8.0)
    assert let_in(subject) == 4
    for _ in range(20):
        subject.learn_batch(0.1)
    assert let_in(subject) > 80


def test_the_wait_doubles_when_half_of_the_replicas_are_gone() -> None:
    subject = admission(num_replicas=2, timeout_s=10)
    subject.learn_batch(2.0)
    both = let_in(subject)
    subject.replicas = 1
    assert (both, let_in(subject)) == (33, 17)
    subject.replicas = 0  # one will come: as with one
    assert let_in(subject) == 17


def test_streams_count_by_the_places_they_keep() -> None:
    subject = admission(timeout_s=10, max_ongoing_requests=8)
    subject.learn_stream(4.0)  # eight at once, so half a second each
    assert let_in(subject) == 13
