"""Messages between a rank and its keeper: JSON lines over a local socket. Nothing is pickled."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
from typing import Any

CHUNK = 1 << 16


class Channel:
    """One end of a connection. `send` may be called from any thread, `receive` from one."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()
        self._read = b""

    def send(self, message: dict[str, Any], *, after_others: bool = False) -> None:
        """Send a message; after those of a process that may have been killed within its last one, on a new line."""
        data = json.dumps(message, default=str).encode() + b"\n"
        with self._sending:
            self._socket.sendall(b"\n" + data if after_others else data)

    def receive(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """Return the next message. Raises EOFError when the other end is closed, TimeoutError when none came."""
        while True:
            line, separator, rest = self._read.partition(b"\n")
            if not separator:
                self._fill(timeout_s)
                continue
            self._read = rest
            with contextlib.suppress(ValueError):  # what a killed process did not send to its end
                message = json.loads(line)
                if isinstance(message, dict):
                    return message

    def _fill(self, timeout_s: float | None) -> None:
        readable, _, _ = select.select([self._socket], [], [], timeout_s)  # the socket's own is one of sending too
        if not readable:
            raise TimeoutError
        try:
            data = self._socket.recv(CHUNK)
        except ConnectionError:
            data = b""
        if not data:
            raise EOFError
        self._read += data

    def abandoned(self) -> bool:
        """Tell whether the other end is closed, without reading anything."""
        poller = select.poll()
        poller.register(self._socket, 0)  # POLLHUP and POLLERR are always told
        return bool(poller.poll(0))

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()
