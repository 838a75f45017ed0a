"""A service under load loses its processes one by one, and is asked for more than it can give.

RAYTX_CHAOS_LONG=1 kills ten times as often, and shows that each of three planted bugs is found.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from echo_server import Server, install, running, until
from overload import Answer, arrivals

from raytx.serve import PROXY_SLACK_S

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.long]

LONG = os.environ.get("RAYTX_CHAOS_LONG") == "1"
KILLS = 20 if LONG else 2
PAUSE_S = 8.0 if LONG else 3.0
"""Between two kills, at most: in the long form most find a service that has just come back."""
STOPS = 3 if LONG else 1
OVERLOADS = {2: 15.0, 8: 15.0} if LONG else {2: 5.0, 8: 5.0}
"""Seconds by multiple of the capacity."""
DEADLINE_S = 20.0
BACK_S = 40.0
"""From a death to full strength, at most: seen within 12 s by health checks, started and loaded on a busy machine."""
TRANSPORT_S = 1.5
"""What the way there and back may add on a busy machine."""
STEP_S = 0.2
SETTINGS: dict[str, Any] = {
    "num_replicas": 2,
    "max_batch_size": 2,
    "max_ongoing_requests": 4,
    "max_queued_requests": 12,
    "timeout_s": DEADLINE_S,
}
INSIDE = 2 * 4 + 12
"""Requests that are let in at once, by these settings."""
CLIENTS = 6
REPLICA, INGRESS, PROXY = "ServeReplica:raytx:Replica", "ServeReplica:raytx:Ingress", "ProxyActor"


# ---------------------------------------------------------------------------------------------- clients and verdicts


@dataclass(frozen=True)
class Outcome:
    """What a client saw of one request."""

    golden: str
    """The answer to this very request when nothing else was asked."""
    text: str = ""
    """The answer, or as much of it as came."""
    status: int = 0
    """0 where the connection broke before an answer began."""
    seconds: float = 0.0
    retry_after: bool = False
    ended: str = "whole"
    """whole, error (an event said that the rest is missing) or broken (the connection did)."""


def faults(outcomes: Sequence[Outcome], *, connections_may_break: bool = False) -> list[str]:
    """Return what must never happen, whatever dies."""
    return [fault for outcome in outcomes if (fault := _fault(outcome, may_break=connections_may_break))]


def _fault(outcome: Outcome, *, may_break: bool) -> str | None:
    if outcome.seconds > DEADLINE_S + PROXY_SLACK_S:
        return f"answered after {outcome.seconds:.1f} s, {DEADLINE_S:g} were allowed"
    if outcome.status == 0 or outcome.ended == "broken":
        return None if may_break else "the connection broke"
    if outcome.status == 200 and outcome.ended == "whole" and outcome.text != outcome.golden:
        return f"{outcome.text!r} where {outcome.golden!r} is right"
    if outcome.status == 200 and not outcome.golden.startswith(outcome.text):
        return f"{outcome.text!r}, then an error, where {outcome.golden!r} is right"
    if outcome.status == 503 and not outcome.retry_after:
        return "503 without Retry-After"
    if outcome.status not in {200, 503, 504}:
        return f"status {outcome.status}"
    return None


Ask = Callable[[httpx.Client, str, int], Outcome]
"""Ask a server a question of some number; the golden answer is filled in by who knows it."""


def classify(client: httpx.Client, url: str, number: int) -> Outcome:
    texts = [f"{letter} {number}" for letter in random.Random(number).choices("abc", k=2)]
    tensor = {"name": "text", "shape": [2], "datatype": "BYTES", "data": texts}
    body = {"id": str(number), "inputs": [tensor]}
    return _timed(client, f"{url}/v2/models/echo/infer", body, lambda answer: json.dumps(answer["outputs"]))


def complete(client: httpx.Client, url: str, number: int) -> Outcome:
    return _timed(client, f"{url}/v1/completions", _prompt(number), lambda answer: str(answer["choices"][0]["text"]))


def stream(client: httpx.Client, url: str, number: int) -> Outcome:
    began, seen = time.monotonic(), Outcome("", ended="broken")
    with contextlib.suppress(httpx.TransportError):
        with client.stream("POST", f"{url}/v1/completions", json=_prompt(number) | {"stream": True}) as answer:
            seen = replace(seen, status=answer.status_code, retry_after="retry-after" in answer.headers)
            for line in answer.iter_lines():
                seen = _event(seen, line.removeprefix("data: ")) if line.startswith("data: ") else seen
        if seen.status not in {0, 200}:
            seen = replace(seen, ended="whole")
    return replace(seen, seconds=time.monotonic() - began)


def _prompt(number: int) -> dict[str, Any]:
    return {"model": "echo", "prompt": f"{number:03}-{number * 7919 % 1000:03} ", "max_tokens": 12, "temperature": 0}


def _event(seen: Outcome, data: str) -> Outcome:
    if data == "[DONE]":
        return replace(seen, ended="whole")
    event = json.loads(data)
    if "error" in event:
        return replace(seen, ended="error")
    return replace(seen, text=seen.text + event["choices"][0]["text"])


def _timed(client: httpx.Client, url: str, body: Any, read: Callable[[Any], str]) -> Outcome:
    began = time.monotonic()
    try:
        answer = client.post(url, json=body)
    except httpx.TransportError:
        return Outcome("", seconds=time.monotonic() - began)
    text = read(answer.json()) if answer.status_code == 200 else ""
    seconds = time.monotonic() - began
    return Outcome("", text, answer.status_code, seconds, retry_after="retry-after" in answer.headers)


@dataclass
class Load:
    """Clients that ask without pause, each request another, and compare with answers given in peace."""

    server: Server
    asks: Sequence[Ask]
    outcomes: list[Outcome] = field(default_factory=list)
    golden: dict[tuple[str, int], str] = field(default_factory=dict)

    def learn(self) -> None:
        with httpx.Client(timeout=60) as client:
            for ask, number in ((ask, number) for ask in self.asks for number in range(12)):
                outcome = ask(client, self.server.url, number)
                assert (outcome.status, outcome.ended) == (200, "whole")
                self.golden[ask.__name__, number] = outcome.text

    @contextlib.contextmanager
    def on(self) -> Iterator[list[Outcome]]:
        """Ask until the context ends; yield what becomes of the requests."""
        over, seen = threading.Event(), len(self.outcomes)
        clients = [threading.Thread(target=self._ask, args=(over, place)) for place in range(CLIENTS)]
        for client in clients:
            client.start()
        outcomes: list[Outcome] = []
        try:
            yield outcomes
        finally:
            over.set()
            for client in clients:
                client.join(DEADLINE_S + 30)
                assert not client.is_alive(), "a request hangs"
            outcomes += self.outcomes[seen:]

    def _ask(self, over: threading.Event, place: int) -> None:
        chance = random.Random(place)
        with httpx.Client(timeout=DEADLINE_S + 20) as client:
            while not over.is_set():
                ask, number = chance.choice(self.asks), chance.randrange(12)
                outcome = ask(client, self.server.url, number)
                self.outcomes.append(replace(outcome, golden=self.golden[ask.__name__, number]))
                if outcome.status != 200:
                    over.wait(0.3)


# --------------------------------------------------------------------------------------------------------- processes


def processes(server: Server, title: str) -> list[psutil.Process]:
    """Return the processes of a server that Ray gave a title, as `ps` shows it."""
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if title in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def until_strong(server: Server, replicas: int = SETTINGS["num_replicas"]) -> float:
    """Wait until so many replicas answer requests of the load; return the seconds it took."""
    began, before = time.monotonic(), len(server.passes())
    alive = lambda: {process.pid for process in processes(server, REPLICA)}  # noqa: E731
    until(lambda: len({pid for pid, _ in server.passes()[before:][-40:]} & alive()) >= replicas, BACK_S)
    return time.monotonic() - began


def kill_one(server: Server, title: str) -> int:
    victim = random.choice(until(lambda: processes(server, title), BACK_S))
    victim.kill()
    return int(victim.pid)


@contextlib.contextmanager
def service(task: str, directory: Path, *, bug: str = "") -> Iterator[Server]:
    step_s = STEP_S if task == "sequence-classification" else STEP_S / 8
    options = SETTINGS | {"step_s": step_s, "bug": bug, "stop": lambda process: process.terminate()}
    directory.mkdir()
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="rx", dir="/tmp", ignore_cleanup_errors=True) as short,
    ):
        patch.setenv("RAY_TMPDIR", short)
        patch.delenv("RAYTX_API_KEY", raising=False)
        site = install(directory / "site")
        with running(task, site, directory, **options) as found:
            yield found


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    with service("sequence-classification", tmp_path_factory.mktemp("chaos") / "classifier") as server:
        load = Load(server, [classify])
        load.learn()
        yield load


@pytest.fixture(scope="module")
def completer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    with service("causal-lm", tmp_path_factory.mktemp("chaos") / "completer") as server:
        load = Load(server, [complete, stream])
        load.learn()
        yield load


def told(title: str, outcomes: Sequence[Outcome], back_s: float | None = None) -> None:
    """Print a line for the table in docs/reliability.md (pytest -s)."""
    states = Counter(f"{outcome.status} {outcome.ended}" for outcome in outcomes)
    slowest = max((outcome.seconds for outcome in outcomes), default=0.0)
    back = "" if back_s is None else f", full strength after {back_s:.1f} s"
    print(f"\n{title}: {len(outcomes)} requests, {dict(states)}, slowest {slowest:.1f} s{back}")


# ------------------------------------------------------------------------------------------------------------- kills


def kills(load: Load, count: int) -> list[Outcome]:
    """Kill replicas at random moments under load, now and then the second before the first is back."""
    with load.on() as outcomes:
        for _ in range(count):
            time.sleep(random.uniform(0.5, PAUSE_S))
            kill_one(load.server, REPLICA)
        back = until_strong(load.server)
    told(f"{count} replicas killed", outcomes, back)
    return outcomes


def test_killed_replicas_cost_no_wrong_answer_of_a_classifier(classifier: Load) -> None:
    outcomes = kills(classifier, KILLS)
    assert not faults(outcomes)
    assert sum(outcome.status == 200 for outcome in outcomes) > 20


def test_killed_replicas_cost_no_wrong_completion_and_no_stream_that_looks_whole(completer: Load) -> None:
    outcomes = kills(completer, KILLS)
    assert not faults(outcomes)
    assert sum(outcome.status == 200 for outcome in outcomes) > 20


def test_a_replica_that_stands_still_is_replaced_and_holds_nobody_past_the_deadline(classifier: Load) -> None:
    for _ in range(STOPS):
        with classifier.on() as outcomes:
            until_strong(classifier.server)
            victim = random.choice(processes(classifier.server, REPLICA))
            victim.suspend()
            began = time.monotonic()
            until(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE, BACK_S)  # noqa: B023
            gone = time.monotonic() - began
            back = until_strong(classifier.server)
        told(f"a replica stopped, ended after {gone:.1f} s", outcomes, back)
        assert not faults(outcomes)
        assert sum(outcome.status == 200 for outcome in outcomes) > 20


@pytest.mark.parametrize("title", [INGRESS, PROXY])
def test_a_dead_front_breaks_connections_but_gives_no_wrong_answer_and_comes_back(completer: Load, title: str) -> None:
    with completer.on() as outcomes:
        until_strong(completer.server)
        victim = kill_one(completer.server, title)
        until(lambda: [one for one in processes(completer.server, title) if one.pid != victim], BACK_S)
        back = until_strong(completer.server)
    told(f"{title} killed", outcomes, back)
    assert not faults(outcomes, connections_may_break=True)
    assert outcomes[-1].status == 200


# ---------------------------------------------------------------------------------------------------------- overload


def question(number: int) -> Any:
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [f"{'abc'[number % 3]} {number}"]}
    return {"inputs": [tensor]}


def flood(server: Server, *, per_second: float, seconds: float) -> list[Answer]:
    bodies = [question(number) for number in range(int(per_second * seconds))]
    return asyncio.run(arrivals(f"{server.url}/v2/models/echo/infer", bodies, per_second=per_second))


def goodput(answers: Sequence[Answer]) -> float:
    """Return right answers per second, from the first request to the last answer."""
    right = [answer for number, answer in enumerate(answers) if answer.status == 200 and is_right(number, answer)]
    return len(right) / max(answer.at for answer in right)


def is_right(number: int, answer: Answer) -> bool:
    label = {"a": "fine", "b": "good", "c": "bad"}["abc"[number % 3]]
    return bool(json.loads(answer.body)["outputs"][0]["data"] == [label])


def p99(answers: Sequence[Answer], status: int) -> float:
    return float(np.quantile([answer.seconds for answer in answers if answer.status == status], 0.99))


def overload_faults(answers: Sequence[Answer], capacity: float) -> list[str]:
    """Return what breaks the promise: who is let in waits for those inside and a batch or two, who is not hears it."""
    bound = INSIDE / capacity + 2 * STEP_S + TRANSPORT_S
    found = [f"status {answer.status}" for answer in answers if answer.status not in {200, 503}]
    found += ["wrong" for number, answer in enumerate(answers) if answer.status == 200 and not is_right(number, answer)]
    if p99(answers, 200) > bound:
        found.append(f"p99 {p99(answers, 200):.2f} s, {bound:.2f} are allowed")
    if goodput(answers) < 0.8 * capacity:
        found.append(f"goodput {goodput(answers):.1f}/s, the capacity is {capacity:.1f}/s")
    refused = [answer for answer in answers if answer.status == 503]
    if not refused:
        found.append("nobody was refused")
    elif statistics.median(answer.seconds for answer in refused) > 0.5 or p99(refused, 503) > TRANSPORT_S:
        found.append(f"503 after {p99(refused, 503):.2f} s")
    return found + ["503 without Retry-After" for answer in refused if "retry-after" not in answer.headers]


def measured_capacity(server: Server) -> float:
    """Return requests per second with both replicas busy and nobody refused: just as many as are let in, at once."""
    best = max(goodput(flood(server, per_second=1000, seconds=INSIDE / 1000)) for _ in range(3))
    by_design = SETTINGS["num_replicas"] * SETTINGS["max_batch_size"] / STEP_S
    assert 0.5 * by_design < best < 1.05 * by_design
    return best


def test_under_overload_answers_come_in_bounded_time_at_full_rate_and_the_rest_is_refused_at_once(
    classifier: Load,
) -> None:
    capacity = measured_capacity(classifier.server)
    for factor, seconds in OVERLOADS.items():
        answers = flood(classifier.server, per_second=factor * capacity, seconds=seconds)
        refused = sum(answer.status == 503 for answer in answers) / len(answers)
        print(
            f"\noverload {factor}x of {capacity:.1f}/s: goodput {goodput(answers):.1f}/s, "
            f"p99 {p99(answers, 200):.2f} s, {refused:.0%} refused within {p99(answers, 503):.2f} s"
        )
        assert not overload_faults(answers, capacity)


# ------------------------------------------------------------------------------------------ that bugs would be found


@pytest.mark.parametrize(
    ("outcome", "word"),
    [
        (Outcome("right", "wrong", 200), "wrong"),
        (Outcome("right", "ri", 200), "ri"),
        (Outcome("right", "riri", 200, ended="error"), "riri"),
        (Outcome("right", "ri", 200, ended="broken"), "broke"),
        (Outcome("right", status=503), "Retry-After"),
        (Outcome("right", status=500), "500"),
        (Outcome("right", "right", 200, seconds=DEADLINE_S + 10), "allowed"),
    ],
)
def test_the_verdict_sees(outcome: Outcome, word: str) -> None:
    assert word in faults([outcome])[0]
    fine = [Outcome("right", "right", 200), Outcome("right", "ri", 200, ended="error")]
    assert not faults([*fine, Outcome("right", status=503, retry_after=True), Outcome("right", status=504)])


NEIGHBOUR = """
import sys
serving = sys.modules["raytx.serve"]
class Confused(serving.Replica):
    "The third of its kind, and so the first that replaces one, gives each the answer of the next in its batch."
    def __init__(self, directory, settings):
        super().__init__(directory, settings)
        with open({births!r}, "a") as file:
            file.write("born\\n")
        self.confused = len(open({births!r}).readlines()) > 2
    def _answer_all(self, tickets):
        answers = super()._answer_all(tickets)
        return answers[1:] + answers[:1] if self.confused else answers
serving.Replica = Confused
"""
TWICE = """
import sys
from ray.exceptions import RayActorError
serving = sys.modules["raytx.serve"]
class Repeating(serving.Ingress):
    "Begins a stream again though a part was sent."
    async def _pieces(self, request, deadline):
        try:
            async for piece in super()._pieces(request, deadline):
                yield piece
        except RayActorError:
            async for piece in super()._pieces(request, deadline):
                yield piece
serving.Ingress = Repeating
"""
UNBOUNDED = """
import sys
serving = sys.modules["raytx.serve"]
class Open(serving.Ingress):
    "Lets everybody in."
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._admission.check = lambda: None
serving.Ingress = Open
bounded = serving._replica_options, serving._ingress_options
room = {"max_queued_requests": -1, "max_ongoing_requests": 10**4}
serving._replica_options = lambda args: bounded[0](args) | room
serving._ingress_options = lambda args: bounded[1](args) | room
"""
long = pytest.mark.skipif(not LONG, reason="RAYTX_CHAOS_LONG=1 plants bugs")


@long
def test_a_neighbours_answer_after_a_restart_is_found(tmp_path: Path) -> None:
    bug = NEIGHBOUR.format(births=str(tmp_path / "births"))
    with service("sequence-classification", tmp_path / "service", bug=bug) as server:
        load = Load(server, [classify])
        load.learn()
        assert faults(kills(load, 2))


@long
def test_a_stream_that_begins_twice_is_found(tmp_path: Path) -> None:
    with service("causal-lm", tmp_path / "service", bug=TWICE) as server:
        load = Load(server, [stream])
        load.learn()
        assert faults(kills(load, 4))


@long
def test_an_unbounded_queue_is_found(tmp_path: Path) -> None:
    with service("sequence-classification", tmp_path / "service", bug=UNBOUNDED) as server:
        Load(server, [classify]).learn()
        capacity = measured_capacity(server)
        found = overload_faults(flood(server, per_second=2 * capacity, seconds=15), capacity)
        assert any("p99" in fault for fault in found)
