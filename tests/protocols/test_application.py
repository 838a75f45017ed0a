"""The application around a protocol: health, and the shape of errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient

from raytx.protocols import RequestError

Make = Callable[..., TestClient]
BODY = {"model": "echo", "prompt": "a"}


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_healthz_is_200_only_when_the_replica_is_ready(client: Make, task: str) -> None:
    made = client(task)
    answer = made.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready", "model": "echo", "task": task})
    made.served.is_ready = False  # type: ignore[attr-defined]
    assert made.get("/healthz").status_code == 503


def test_overload_is_503_with_retry_after(client: Make) -> None:
    answer = client("causal-lm", fault=RequestError(503, "full", retry_after_s=1)).post("/v1/completions", json=BODY)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"] == {"message": "full", "type": "overloaded_error", "param": None, "code": None}


def test_a_failure_is_500_in_the_protocols_shape_and_tells_no_secrets(client: Make) -> None:
    answer = client("causal-lm", fault=ValueError("secret path /home/me")).post("/v1/completions", json=BODY)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/chat", 404), ("GET", "/v1/completions", 405)])
def test_unknown_routes_and_methods_have_the_protocols_shape(client: Make, method: str, path: str, status: int) -> None:
    answer = client("causal-lm").request(method, path)
    assert answer.status_code == status
    assert f"{method} {path}" in answer.json()["error"]["message"]


def test_the_answer_to_a_wrong_body_does_not_repeat_it(client: Make) -> None:
    answer = client("causal-lm").post("/v1/completions", json={"x" * 5000: 1, "prompt": "secret" * 1000})
    assert answer.status_code == 400
    assert len(answer.text) < 1000
    assert "secret" not in answer.text


def test_docs_and_openapi_are_there(client: Make) -> None:
    made = client("sequence-classification")
    assert "swagger" in made.get("/docs").text
    assert "InferRequest" in made.get("/openapi.json").json()["components"]["schemas"]
