"""A served model without Ray: the real tasks and admission, in this process."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from raytx.protocols import PROTOCOLS, Description, RequestError, application
from raytx.sections import Serving
from raytx.tasks import Request, Response

sys.path.insert(0, str(Path(__file__).parent))  # where the plugin is

from raytx_echo import Echo, EchoRunner

BASE_URL = "http://127.0.0.1:8000"


class Local:
    """Fulfils raytx.protocols.Served. `fault` is raised instead of answering, or after so many pieces of a stream."""

    def __init__(self, task: str, *, fault: Exception | None = None, after: int = 0, **settings: Any) -> None:
        self.task = Echo(task).task(Path())
        labels = self.task.label_names()
        self.description = Description("echo", task, "echo", tuple(labels) if labels else None, created=1)
        self.settings = Serving(**settings)
        self.protocol = PROTOCOLS[self.task.protocol]
        self.fault, self.after = fault, after
        self.is_ready = True
        self.has_room = True
        self.seen: list[Request] = []

    async def predict(self, requests: Sequence[Request]) -> list[Response]:
        if self.fault:
            raise self.fault
        self.seen += requests
        admitted = [self.protocol.admit(self.task, request, self.settings) for request in requests]
        return self.task.predict(EchoRunner(), admitted)

    async def stream(self, request: Request) -> AsyncIterator[Response]:
        self.seen.append(request)
        admitted = self.protocol.admit(self.task, request, self.settings)
        for count, piece in enumerate(self.task.stream(EchoRunner(), admitted)):
            if self.fault and count >= self.after:
                raise self.fault
            yield piece

    async def ready(self) -> bool:
        return self.is_ready

    def check_room(self) -> None:
        if not self.has_room:
            raise RequestError(503, "no room", retry_after_s=1)


@pytest.fixture
def client() -> Callable[..., TestClient]:
    """Return a function that makes a client of a served task; what is served is the client's `served`."""

    def make(task: str, *, key_digest: str | None = None, loopback: bool = True, **options: Any) -> TestClient:
        served = Local(task, **options)
        app = application(served, served.protocol, key_digest=key_digest, loopback=loopback)
        made = TestClient(app, base_url=BASE_URL, raise_server_exceptions=False)
        made.served = served  # type: ignore[attr-defined]
        return made

    return make
