"""Serving: what is refused before Ray starts, and two servers as a user starts them, asked over HTTP."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from echo_server import PLUGIN, STEP_S, Server, free_port, install, launch, running, until

from raytx.errors import ArtifactError, PluginError, RecipeError, ResourceError
from raytx.registry import registry


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("site"))


@pytest.fixture
def plugin(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install the echo plugin in this process."""
    monkeypatch.syspath_prepend(str(site))
    for name, value in PLUGIN.items():
        monkeypatch.setenv(name, value)
    registry.cache_clear()
    yield
    registry.cache_clear()


@pytest.fixture
def artifact(plugin: None, tmp_path: Path) -> Path:
    import raytx_echo

    return raytx_echo.write_artifact(tmp_path, "causal-lm")


@pytest.fixture(scope="module", autouse=True)
def short_directory() -> Iterator[None]:
    """Give the servers a directory for Ray: a short one, because Unix sockets go there."""
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="rx", dir="/tmp", ignore_cleanup_errors=True) as directory,
    ):
        patch.setenv("RAY_TMPDIR", directory)
        yield


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYTX_API_KEY", raising=False)


# ----------------------------------------------------------------------------------------- refused before Ray starts


@pytest.fixture
def refuses(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that serves, demands an error, and fails if Ray was touched."""
    from raytx import cluster
    from raytx.serve import serve

    def touched(*args: Any, **options: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(cluster, "connect", touched)

    def refused(kind: type[Exception], directory: Path, **options: Any) -> str:
        with pytest.raises(kind) as caught:
            serve(directory, **({"port": free_port()} | options))
        return str(caught.value)

    return refused


def test_a_tampered_artifact_is_refused(refuses: Callable[..., str], artifact: Path) -> None:
    (artifact / "weights.txt").write_text("evil", encoding="utf-8")
    assert "weights.txt: its SHA-256 differs" in refuses(ArtifactError, artifact)


def test_a_directory_that_is_no_artifact_is_refused(refuses: Callable[..., str], tmp_path: Path) -> None:
    assert "not an artifact directory" in refuses(ArtifactError, tmp_path)
    assert "no such directory" in refuses(ArtifactError, tmp_path / "nowhere")


def test_an_artifact_whose_plugin_is_missing_is_refused(
    refuses: Callable[..., str], artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYTX_PLUGINS", "")
    registry.cache_clear()
    assert "'raytx_echo' 1.0 is needed" in refuses(PluginError, artifact)


@pytest.mark.parametrize("sharing", [False, True])
def test_a_port_in_use_is_refused_even_one_that_would_be_shared(
    refuses: Callable[..., str], artifact: Path, sharing: bool
) -> None:
    with socket.socket() as taken:
        if sharing:  # as Ray Serve opens its own
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refuses(ResourceError, artifact, port=port)
    assert f"port {port}" in message
    assert "--port" in message


def test_a_host_that_others_reach_needs_a_token(refuses: Callable[..., str], artifact: Path) -> None:
    assert "RAYTX_API_KEY" in refuses(RecipeError, artifact, host="0.0.0.0")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_batch_sise": 2}, "Did you mean 'max_batch_size'?"),
        ({"port": 0}, "serving.port"),
        ({"max_batch_size": 20}, "a batch could never fill"),
        ({"max_queued_requests": 0}, "serving.max_queued_requests: Input should be greater than 0"),
        ({"timeout_s": -1}, "serving.timeout_s"),
    ],
)
def test_impossible_settings_are_refused(
    refuses: Callable[..., str], artifact: Path, options: dict[str, Any], words: str
) -> None:
    assert words in refuses(RecipeError, artifact, **options)


def test_the_builder_takes_the_arguments_of_a_serve_config_file(artifact: Path) -> None:
    from ray.serve import Application
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as call

    from raytx.serve import build_app

    assert isinstance(call(build_app, {"directory": str(artifact), "num_replicas": 2}), Application)
    with pytest.raises(ValueError, match="num_replica"):
        call(build_app, {"directory": str(artifact), "num_replica": 2})


# --------------------------------------------------------------------------------------------------- a real server


def terminate(process: subprocess.Popen[str]) -> None:
    """Stop a server as a shell does: SIGTERM to the process alone."""
    process.send_signal(signal.SIGTERM)


def terminate_group(process: subprocess.Popen[str]) -> None:
    """Stop a server as service managers do: SIGTERM to the process, and to Ray's processes with it."""
    process.send_signal(signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)


@pytest.fixture(scope="module")
def completions(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"max_batch_size": 4, "max_ongoing_requests": 4, "max_queued_requests": 8, "batch_wait_s": 0.05}
    directory = tmp_path_factory.mktemp("completions")
    options = settings | {"timeout_s": 4, "max_body_bytes": 10_000, "stop": terminate}
    with running("causal-lm", site, directory, **options) as server:
        yield server


@pytest.fixture(scope="module")
def classification(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("classification")
    options = {"key": "sesame", "batch_wait_s": 0.1, "stop": terminate_group}
    with running("sequence-classification", site, directory, **options) as server:
        yield server


ray = pytest.mark.ray


@ray
def test_what_is_printed_is_the_address_and_a_command_that_works(completions: Server) -> None:
    curl = next(line for line in completions.said if line.startswith("curl "))
    assert completions.url in curl
    answer = subprocess.run(shlex.split(curl), capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(answer.stdout)["object"] == "text_completion"
    assert len(completions.said) <= 3, "".join(completions.said)


@ray
def test_health_and_description_are_served(completions: Server) -> None:
    assert httpx.get(f"{completions.url}/healthz").json() == {"status": "ready", "model": "echo", "task": "causal-lm"}
    assert httpx.get(f"{completions.url}/v1/models").json()["data"][0]["id"] == "echo"
    assert httpx.get(f"{completions.url}/docs").status_code == 200


@ray
def test_openais_own_client_works_whole_and_streamed(completions: Server) -> None:
    client = openai.OpenAI(base_url=f"{completions.url}/v1", api_key="none", max_retries=0)
    options: dict[str, Any] = {"model": "echo", "prompt": "grün 🙂 ", "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    assert whole.choices[0].text.startswith("grün 🙂 grün")
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**options | {"model": "other"})
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(**options | {"prompt": "x" * 300})


@ray
def test_pieces_arrive_as_they_are_made(completions: Server) -> None:
    arrivals = []
    body = {"model": "echo", "prompt": "abc", "max_tokens": 40, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{completions.url}/v1/completions", json=body, timeout=60) as answer:
        arrivals = [time.monotonic() for line in answer.iter_lines() if line]
    assert arrivals[-1] - arrivals[0] > 30 * STEP_S


@ray
def test_concurrent_requests_share_batches_and_each_gets_its_own_answer(completions: Server) -> None:
    before = len(completions.passes())
    prompts = [f"{number}-{'x' * number}!" for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: completions.complete(prompt, max_tokens=9), prompts))
    assert [answer.status_code for answer in answers] == [200] * 8
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.json()["choices"][0]["text"] == (prompt * 9)[:9]
    assert max(rows for _, rows in completions.passes()[before:]) > 1


@ray
@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b'{"model": "echo", "prompt": ', 400, "not valid JSON"),
        (b'{"model": "echo", "prompt": 7}', 400, "prompt"),
        (b'{"model": "echo", "prompt": "' + b"x" * 201 + b'"}', 400, "201 tokens"),
        (b'{"model": "echo", "prompt": "x", "max_tokens": 5000}', 400, "1024"),
        (b" " * 10_001, 413, "10,000 bytes"),
    ],
)
def test_a_bad_request_gets_a_4xx_that_says_what_is_wrong_and_the_replica_lives_on(
    completions: Server, content: bytes, status: int, words: str
) -> None:
    replica = completions.complete("a", max_tokens=1) and completions.passes()[-1][0]
    for body in (content, iter([content[:20], content[20:]])):  # the second is chunked, without a length
        headers = {"content-type": "application/json"}
        answer = httpx.post(f"{completions.url}/v1/completions", content=body, headers=headers, timeout=60)
        assert answer.status_code == status
        assert words in answer.json()["error"]["message"]
    assert completions.complete("a", max_tokens=1).status_code == 200
    assert completions.passes()[-1][0] == replica


@ray
def test_one_request_that_makes_the_model_fail_does_not_fail_its_neighbours(completions: Server) -> None:
    prompts = ["one", "two", "\a", "four"]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda prompt: completions.complete(prompt, max_tokens=4), prompts))
    assert [answer.status_code for answer in answers] == [200, 200, 500, 200]
    assert [a.json()["choices"][0]["text"] for a in answers if a.status_code == 200] == ["oneo", "twot", "four"]
    assert answers[2].json()["error"]["type"] == "server_error"
    assert "poisoned" not in answers[2].text
    assert "Traceback" not in answers[2].text


@ray
def test_overload_is_answered_503_at_once_and_the_rest_in_bounded_time(completions: Server) -> None:
    def timed(number: int) -> tuple[int, float, httpx.Response]:
        began = time.monotonic()
        answer = completions.complete(str(number), max_tokens=20)
        return answer.status_code, time.monotonic() - began, answer

    with ThreadPoolExecutor(48) as pool:
        results = list(pool.map(timed, range(48)))
    refused = [(seconds, answer) for status, seconds, answer in results if status == 503]
    served = [seconds for status, seconds, _ in results if status == 200]
    assert {status for status, _, _ in results} == {200, 503}
    assert len(refused) >= 16  # 4 run and 8 wait; a slow machine finishes some before the last has come
    assert all(answer.headers["retry-after"] == "1" for _, answer in refused)
    assert all(answer.json()["error"]["type"] == "overloaded_error" for _, answer in refused)
    assert max(seconds for seconds, _ in refused) < 2.0
    assert max(served) < 4.0 + 1.0  # the deadline of a request, and the way there and back
    assert completions.complete("after", max_tokens=5).json()["choices"][0]["text"] == "after"


@ray
def test_health_is_told_while_the_replica_is_busy(completions: Server) -> None:
    with ThreadPoolExecutor(13) as pool:
        busy = [pool.submit(completions.complete, "busy", max_tokens=60) for _ in range(12)]
        time.sleep(0.3)
        began = time.monotonic()
        assert httpx.get(f"{completions.url}/healthz", timeout=10).status_code == 200
        assert time.monotonic() - began < 2.0
        assert {future.result().status_code for future in busy} <= {200, 503, 504}


def is_quiet(server: Server) -> bool:
    """Tell whether no forward pass was made for many steps' time."""
    before = len(server.passes())
    time.sleep(10 * STEP_S)
    return len(server.passes()) == before


@ray
def test_a_client_that_leaves_stops_its_generation(completions: Server) -> None:
    until(lambda: is_quiet(completions))
    before = len(completions.passes())
    body = {"model": "echo", "prompt": "abc", "max_tokens": 190, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{completions.url}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{completions.url}/v1/completions", json=body | {"stream": False}, timeout=0.5)
    until(lambda: is_quiet(completions), 3)
    assert len(completions.passes()) - before < 150


@ray
def test_a_request_past_its_deadline_gets_504_and_is_stopped(completions: Server) -> None:
    """190 tokens take at least 3.8 s; two requests one after the other, in batches of their own, pass 4 s."""
    until(lambda: is_quiet(completions))
    body = {"model": "echo", "prompt": "abc", "max_tokens": 190, "temperature": 0}
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(completions.post, "/v1/completions", body)
        time.sleep(1.0)
        second = pool.submit(completions.post, "/v1/completions", body)
        late = [answer.result() for answer in (first, second)][-1]
    assert late.status_code == 504
    assert "4 s (serving.timeout_s)" in late.json()["error"]["message"]
    assert time.monotonic() - began < 8
    until(lambda: is_quiet(completions), 3)


@ray
def test_another_host_name_is_refused(completions: Server) -> None:
    answer = httpx.get(f"{completions.url}/v1/models", headers={"host": "evil.example"})
    assert answer.status_code == 403


@ray
def test_only_who_has_the_key_is_answered(classification: Server) -> None:
    assert classification.texts("a").status_code == 401
    assert httpx.get(f"{classification.url}/healthz").status_code == 200
    curl = next(line for line in classification.said if line.startswith("curl "))
    assert "sesame" not in "".join(classification.said)
    environment = {**os.environ, "RAYTX_API_KEY": "sesame"}
    answer = subprocess.run(curl, shell=True, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(answer.stdout)["outputs"][0]["name"] == "label"


@ray
def test_rows_of_concurrent_requests_share_a_forward_pass_and_go_back_where_they_came_from(
    classification: Server,
) -> None:
    def labels(texts: str) -> list[str]:
        tensor = {"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": list(texts)}
        headers = {"authorization": "Bearer sesame"}
        answer = classification.post("/v2/models/echo/infer", {"inputs": [tensor]}, headers=headers)
        return list(answer.json()["outputs"][0]["data"])

    before = len(classification.passes())
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(labels, ["a", "bc", "c", "abc", "b", "ca"]))
    names = {"a": "fine", "b": "good", "c": "bad"}
    assert answers == [[names[letter] for letter in texts] for texts in ["a", "bc", "c", "abc", "b", "ca"]]
    assert max(rows for _, rows in classification.passes()[before:]) > 3


@ray
def test_a_wrong_datatype_is_refused_and_the_replica_lives_on(classification: Server) -> None:
    headers = {"authorization": "Bearer sesame"}
    tensor = {"name": "text", "shape": [1], "datatype": "FP32", "data": [1.5]}
    answer = classification.post("/v2/models/echo/infer", {"inputs": [tensor]}, headers=headers)
    assert (answer.status_code, "BYTES" in answer.json()["error"]) == (400, True)
    tensor |= {"datatype": "BYTES", "data": ["a"]}
    assert classification.post("/v2/models/echo/infer", {"inputs": [tensor]}, headers=headers).status_code == 200


@ray
def test_a_replica_that_dies_is_replaced(classification: Server) -> None:
    headers = {"authorization": "Bearer sesame"}
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}
    ask = lambda: classification.post("/v2/models/echo/infer", {"inputs": [tensor]}, headers=headers)  # noqa: E731
    assert ask().status_code == 200
    victim = classification.passes()[-1][0]
    os.kill(victim, signal.SIGKILL)
    until(lambda: ask().status_code == 200 and classification.passes()[-1][0] != victim, 60)
    until(lambda: httpx.get(f"{classification.url}/healthz").status_code == 200)


@ray
def test_an_artifact_that_disagrees_with_its_golden_outputs_is_not_served(site: Path, tmp_path: Path) -> None:
    """Its hashes are right, so only the replica, which loads it, can tell."""
    code = (
        "EchoRunner.logits, honest = lambda self, features: 1 + honest(self, features), EchoRunner.logits\n"
        f"directory = write_artifact(Path({str(tmp_path)!r}), 'causal-lm')\n"
        f"serve(directory, port={free_port()})"
    )
    process = launch(site, code)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 1
    assert "raytx.errors.ArtifactError: the replica could not start" in said
    assert "differ by 1.00e+00 from the golden ones" in said.splitlines()[-1]
