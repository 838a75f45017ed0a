"""Servers of the echo plugin, started as a user starts one: in a process of its own, with a Ray of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

ECHO = Path(__file__).parents[1] / "protocols"
PLUGIN = {"RAYTX_DISABLE_PLUGIN_AUTOLOAD": "1", "RAYTX_PLUGINS": "raytx_echo"}
STEP_S = 0.02
"""Each token takes this long, so that requests overlap."""


@dataclass(frozen=True)
class Server:
    """A running `serve`, and what it said."""

    url: str
    process: subprocess.Popen[str]
    said: list[str]
    trace: Path
    """A line for each forward pass: process id, rows."""
    client: httpx.Client
    """One for all threads: making one takes longer than the server's answer."""

    def passes(self) -> list[tuple[int, int]]:
        if not self.trace.exists():
            return []
        lines = self.trace.read_text(encoding="utf-8").splitlines()
        return [(int(pid), int(rows)) for pid, rows in (line.split() for line in lines)]

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(self.url + path, json=body, **options)

    def complete(self, prompt: Any, **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": "echo", "prompt": prompt, "temperature": 0} | fields)

    def texts(self, *texts: str) -> httpx.Response:
        tensor = {"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": list(texts)}
        return self.post("/v2/models/echo/infer", {"inputs": [tensor]})


@contextlib.contextmanager
def running(
    task: str,
    site: Path,
    tmp_path: Path,
    *,
    stop: Callable[[subprocess.Popen[str]], None],
    key: str | None = None,
    step_s: float = STEP_S,
    bug: str = "",
    **settings: Any,
) -> Iterator[Server]:
    """Serve in a process of its own, as `raytx serve` does; stop it and demand exit code 0 and a free port.

    `bug` is code that is run first.
    """
    port, trace = free_port(), tmp_path / "trace"
    given = {"port": port} | settings
    artifact = f"write_artifact(Path({str(tmp_path)!r}), {task!r}, step_s={step_s}, trace={str(trace)!r})"
    code = f"{bug}\nserve({artifact}, **{given!r})"
    process = launch(site, code, **({"RAYTX_API_KEY": key} if key else {}))
    said: list[str] = []
    threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True).start()
    try:
        until(lambda: any("curl" in line for line in said) or process.poll() is not None, 180)
        assert process.poll() is None, "".join(said)
        with httpx.Client(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
            yield Server(f"http://127.0.0.1:{port}", process, said, trace, client)
        stop(process)
        assert process.wait(60) == 0, "".join(said)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/healthz")
    finally:
        process.kill()
        process.wait()


def launch(site: Path, code: str, **variables: str) -> subprocess.Popen[str]:
    """Start a process that has the echo plugin and a Ray of its own."""
    environment = {
        **os.environ,
        **PLUGIN,
        "PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "RAY_AUTH_MODE": "disabled",
        "PYTHONUNBUFFERED": "1",
    }
    code = f"from pathlib import Path; from raytx_echo import *; from raytx.serve import serve\n{code}"
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=environment | variables, start_new_session=True, **pipes)


def install(directory: Path) -> Path:
    """Install the echo plugin in a directory as pip would leave it; return the directory."""
    info = directory / "raytx_echo-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: raytx-echo\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[raytx]\nraytx_echo = raytx_echo\n", encoding="utf-8")
    (directory / "raytx_echo.py").write_bytes((ECHO / "raytx_echo.py").read_bytes())
    return directory


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Wait for a condition and return its value; fail when it does not come true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
    return value
