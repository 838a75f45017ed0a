"""What a service gives at multiples of its capacity: raytx's, and the same model behind Ray Serve's defaults.

    python benchmarks/overload.py --factors 0.5 1 2 8

The model takes a fixed time for a batch, so that its capacity is known: batch size / time. Requests arrive at even
intervals whatever becomes of those before them (an open loop): clients that wait for their answers would slow down
together with the service and hide what it does to those who keep coming. A row is one run of its own arrival rate;
goodput counts answers within --patience, for nobody reads later ones.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

BATCH_SIZE = 8
COLUMNS = ("service", "load", "arrivals/s", "goodput/s", "of capacity", "p50, s", "p99, s", "503", "503 p99, s", "lost")
PORTS = {"raytx": 8711, "Ray Serve": 8712}


@dataclass(frozen=True)
class Answer:
    """What became of one request."""

    status: int
    """0 when none came."""
    seconds: float
    """From when it was due, so that a client that is late does not hide it."""
    at: float
    """Seconds from the first request to the end of this one."""
    body: bytes
    headers: dict[str, str]


async def arrivals(
    url: str, bodies: Sequence[Any], *, per_second: float, timeout_s: float = 60, path: str = ""
) -> list[Answer]:
    """Send bodies at even intervals, whatever becomes of those before; return their answers in order."""
    limits = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=limits) as session:
        began = asyncio.get_running_loop().time()

        async def one(number: int) -> Answer:
            due = began + number / per_second
            await asyncio.sleep(due - asyncio.get_running_loop().time())
            status, content, headers = await _post(session, url + path, bodies[number])
            now = asyncio.get_running_loop().time()
            return Answer(status, now - due, now - began, content, headers)

        return list(await asyncio.gather(*map(one, range(len(bodies)))))


async def _post(session: aiohttp.ClientSession, url: str, body: Any) -> tuple[int, bytes, dict[str, str]]:
    try:
        async with session.post(url, json=body) as answer:
            return answer.status, await answer.read(), {k.lower(): v for k, v in answer.headers.items()}
    except (aiohttp.ClientError, TimeoutError):
        return 0, b"", {}


# --------------------------------------------------------------------------------------------------- two services


def serve_raytx(directory: str, step_s: float, port: int, patience: float) -> None:
    """Serve the echo model of the tests as `raytx serve` does, with the clients' patience as its deadline."""
    os.environ |= {"RAYTX_DISABLE_PLUGIN_AUTOLOAD": "1", "RAYTX_PLUGINS": "raytx_echo", "PYTHONPATH": _paths(directory)}
    from raytx.serve import serve

    artifact = _echo(directory).write_artifact(Path(directory), "sequence-classification", step_s=step_s)
    with redirect_stdout(sys.stderr):
        serve(artifact, port=port, max_batch_size=BATCH_SIZE, timeout_s=patience)


def serve_bare(step_s: float, port: int) -> None:
    """Serve a model of the same speed behind Ray Serve's defaults: an unbounded queue, five requests at a time.

    Only max_ongoing_requests is raised to twice the batch size, as in raytx: with five a batch of eight never fills.
    """
    import ray
    from ray import serve

    @serve.deployment(max_ongoing_requests=2 * BATCH_SIZE)
    class Model:
        @serve.batch(max_batch_size=BATCH_SIZE, batch_wait_timeout_s=0.01)
        async def answer(self, bodies: list[Any]) -> list[Any]:
            await asyncio.sleep(step_s)
            return [{"outputs": body["inputs"]} for body in bodies]

        async def __call__(self, request: Any) -> Any:
            return await self.answer(await request.json())

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"enable_access_log": False})
    serve.run(Model.bind(), blocking=True)


def _paths(directory: str) -> str:
    return os.pathsep.join([directory, *filter(None, [os.environ.get("PYTHONPATH")])])


def _echo(directory: str) -> Any:
    """Install the tests' echo plugin in a directory and return it."""
    root = Path(__file__).parents[1] / "tests"
    sys.path[:0] = [directory, str(root / "integration")]
    from echo_server import install

    install(Path(directory))
    import raytx_echo

    return raytx_echo


# ----------------------------------------------------------------------------------------------------- the table


def main() -> None:
    options = _options()
    print(f"capacity {BATCH_SIZE / options.step_s:.0f} requests/s: batches of {BATCH_SIZE} in {options.step_s} s each")
    print("| " + " | ".join(COLUMNS) + " |\n|---" + "|--:" * (len(COLUMNS) - 1) + "|")
    for service, port in PORTS.items():
        with tempfile.TemporaryDirectory(prefix="rx", dir="/tmp", ignore_cleanup_errors=True) as directory:
            process = _start(service, directory, options, port)
            try:
                asyncio.run(_rows(service, f"http://127.0.0.1:{port}/v2/models/echo/infer", options))
            finally:
                process.terminate()
                process.join(60)


def _start(service: str, directory: str, options: argparse.Namespace, port: int) -> Any:
    os.environ |= {"RAY_TMPDIR": directory, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    spawn = multiprocessing.get_context("spawn")
    arguments = (directory, options.step_s, port, options.patience)
    raytx = spawn.Process(target=serve_raytx, args=arguments)
    process = raytx if service == "raytx" else spawn.Process(target=serve_bare, args=(options.step_s, port))
    process.start()
    return process


async def _rows(service: str, url: str, options: argparse.Namespace) -> None:
    capacity = BATCH_SIZE / options.step_s
    await _until_ready(url)
    for factor in options.factors:
        count = int(factor * capacity * options.seconds)
        answers = await arrivals(url, [_body(n) for n in range(count)], per_second=factor * capacity)
        print(_row(service, factor, answers, capacity=capacity, options=options), flush=True)
        await asyncio.sleep(2)


def _body(number: int) -> Any:
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [f"{'abc'[number % 3]} {number}"]}
    return {"inputs": [tensor]}


async def _until_ready(url: str) -> None:
    for _ in range(120):
        answers = await arrivals(url, [_body(0)] * BATCH_SIZE, per_second=100)
        if all(answer.status == 200 for answer in answers):
            return
        await asyncio.sleep(1)
    raise SystemExit(f"{url} does not answer")


def _row(
    service: str, factor: float, answers: Sequence[Answer], *, capacity: float, options: argparse.Namespace
) -> str:
    took = np.array([answer.seconds for answer in answers if answer.status == 200] or [np.nan])
    refused = [answer.seconds for answer in answers if answer.status == 503]
    good = int((took <= options.patience).sum())
    span = max(answer.at for answer in answers)
    slowest = f"{np.quantile(refused, 0.99):.2f}" if refused else "-"
    lost = len(answers) - good - len(refused)
    return (
        f"| {service} | {factor:g} | {factor * capacity:.0f} | {good / span:.1f} | {good / span / capacity:.2f} "
        f"| {np.quantile(took, 0.5):.2f} | {np.quantile(took, 0.99):.2f} | {len(refused) / len(answers):.0%} "
        f"| {slowest} | {lost} |"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 1, 2, 8])
    parser.add_argument("--seconds", type=float, default=20, help="length of a run")
    parser.add_argument("--step-s", type=float, default=0.8, help="seconds the model takes for a batch")
    parser.add_argument("--patience", type=float, default=5, help="seconds after which an answer counts for nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
