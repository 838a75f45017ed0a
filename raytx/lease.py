"""Who holds a run that is in a store: one process at a time, which renews a file there for as long as it lives.

A kernel's lock ends with its owner; a file in a store does not. So who finds one watches it: a holder that lives renews
it, and clocks of different machines are never compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from raytx import status
from raytx.errors import ResourceError
from raytx.storage import Store

LEASE = "lease"
RENEW_S = 5.0
STALE_S = 20.0
"""A lease that has not changed for so long has no holder any more."""
SETTLE_S = 0.5
"""Of two who take a lease at the same moment, the one that wrote last has it; so long each waits to see."""


def _end() -> None:
    """End at once, and everything with it: what would still be saved and copied would be put into another's run."""
    sys.stdout.flush()
    os._exit(2)


@dataclass(frozen=True)
class Lease:
    """A file in a store."""

    store: Store
    name: str
    place: str
    """Names the local directory whose lock the caller holds: whoever had the lease there is gone."""

    @contextlib.contextmanager
    def held(
        self, *, doing: str, tell: Callable[[str], None], lost: Callable[[], None] = _end
    ) -> Iterator[Callable[[], bool]]:
        """Hold it while the block runs; refuse where another process does, and take over from one that is gone.

        Yields what tells whether it is still held. `lost` is called, from a thread, when another has taken it, as this
        process was out of reach for too long; by default this one then ends, as if it were killed.
        """
        mine = status.this(doing) | {"place": self.place, "id": uuid.uuid4().hex}
        self._take(mine, tell)
        done, gone = threading.Event(), threading.Event()

        def leave() -> None:
            gone.set()
            lost()

        renewal = threading.Thread(target=self._renew, args=(mine, done, tell, leave), daemon=True)
        renewal.start()
        try:
            yield lambda: not gone.is_set()
        finally:
            done.set()
            renewal.join(timeout=RENEW_S)
            with contextlib.suppress(OSError):
                if self._holder().get("id") == mine["id"]:
                    self.store.remove(self.name)

    def _take(self, mine: dict[str, Any], tell: Callable[[str], None]) -> None:
        try:
            other = self._holder()
            if other and other.get("place") != self.place:
                tell(f"{_who(other)} has held this run; looking for {STALE_S:.0f} s whether it still does")
                self._outlive(other)
                tell(f"{_who(other)} is gone; this run is taken over")
            self._write(mine, beat=0)
            time.sleep(SETTLE_S)
            if (other := self._holder()).get("id") != mine["id"]:
                raise ResourceError(self._in_use(other))
        except OSError as error:
            raise ResourceError(f"storage_path: cannot use {self.store.uri}: {error}") from None

    def _outlive(self, other: dict[str, Any]) -> None:
        """Return when a holder has shown no life for long enough; raise ResourceError when it does."""
        deadline = time.monotonic() + STALE_S
        while time.monotonic() < deadline:
            time.sleep(min(1.0, STALE_S / 4))
            if not (now := self._holder()):
                return
            if now != other:
                raise ResourceError(self._in_use(now))

    def _renew(
        self, mine: dict[str, Any], done: threading.Event, tell: Callable[[str], None], lost: Callable[[], None]
    ) -> None:
        beat = 0
        while not done.wait(RENEW_S):
            beat += 1
            with contextlib.suppress(OSError):  # it may be back the next time
                other = self._holder()
                if other and other.get("id") != mine["id"]:
                    tell(f"{_who(other)} has taken this run over; this process ends")
                    return lost()
                if not done.is_set():
                    self._write(mine, beat=beat)

    def _holder(self) -> dict[str, Any]:
        """Return what the holder says of itself; empty where there is none."""
        if (said := self.store.read(self.name)) is None:
            return {}
        try:
            found = json.loads(said)
        except ValueError:  # of a store that shows what is being written
            found = None
        return found if isinstance(found, dict) else {"unreadable": said.hex()}

    def _write(self, mine: dict[str, Any], *, beat: int) -> None:
        self.store.write(self.name, json.dumps(mine | {"renewed": round(time.time(), 3), "beat": beat}).encode())

    def _in_use(self, other: dict[str, Any]) -> str:
        return (
            f"the run in {self.store.uri} is in use by another process ({_who(other)}), which renews {self.name} "
            "there. Wait for it, or give this one another name"
        )


def _who(other: dict[str, Any]) -> str:
    return f"{other.get('doing', 'somebody')}, pid {other.get('pid', '?')} on {other.get('host', '?')}"
