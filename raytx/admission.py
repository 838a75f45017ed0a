"""Whether one more request is let in: not when too many are inside, nor when its answer would come too late."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from raytx.protocols import RequestError
from raytx.sections import Serving

RETRY_AFTER_S = 1
WEIGHT = 0.2
"""Share of the newest measurement in what is expected of the next: a change is believed after about five answers."""


class Admission:
    """Counts what is inside and measures how fast it leaves. One event loop uses it.

    The wait of a request is the work ahead of it: rows inside x seconds that a row keeps a replica busy / replicas. By
    Little's law that holds however the rows are spread over queues, so nobody has to ask the queues.
    """

    def __init__(self, settings: Serving) -> None:
        self.replicas = settings.num_replicas
        """Replicas that run; whoever knows better sets it."""
        self._settings = settings
        self._requests = 0
        self._rows = 0
        self._row_s = 0.0
        self._answer_s = 0.0

    @contextmanager
    def entry(self, rows: int) -> Iterator[None]:
        """Let a request of so many rows in until the context ends; raise RequestError (503) instead of letting it wait
        in vain."""
        self.check()
        self._requests += 1
        self._rows += rows
        try:
            yield
        finally:
            self._requests -= 1
            self._rows -= rows

    def check(self) -> None:
        """Raise RequestError (503) when no request can be let in, whatever it asks."""
        limit = self._settings.num_replicas * self._settings.max_ongoing_requests + self._settings.max_queued_requests
        if self._requests >= limit:
            raise _refusal("all replicas are busy and the queue is full")
        # While a replica has room for a whole batch, it is asked: else a time once measured could refuse for ever.
        if self._rows >= max(self.replicas, 1) * self._settings.max_batch_size and self._is_too_late():
            raise _refusal(f"all replicas are busy and the queue is {self.wait_s:.1f} s long")

    @property
    def wait_s(self) -> float:
        """Seconds that a request let in now would wait for its turn."""
        return self._rows * self._row_s / max(self.replicas, 1)

    def learn_batch(self, seconds: float) -> None:
        """Take note that a batch took so long. A full one would have taken about as long."""
        self._learn(seconds, seconds / self._settings.max_batch_size)

    def learn_stream(self, seconds: float) -> None:
        """Take note that a streamed answer kept one of a replica's places for so long."""
        self._learn(seconds, seconds / self._settings.max_ongoing_requests)

    def _learn(self, answer_s: float, row_s: float) -> None:
        weight = WEIGHT if self._answer_s else 1.0
        self._answer_s += weight * (answer_s - self._answer_s)
        self._row_s += weight * (row_s - self._row_s)

    def _is_too_late(self) -> bool:
        longest = self._settings.max_wait_s
        too_long = longest is not None and self.wait_s > longest
        return too_long or self.wait_s + self._answer_s > self._settings.timeout_s


def _refusal(message: str) -> RequestError:
    return RequestError(503, message, retry_after_s=RETRY_AFTER_S)
