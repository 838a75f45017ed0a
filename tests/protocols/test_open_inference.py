"""The Open Inference Protocol, in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

Make = Callable[..., TestClient]
URL = "/v2/models/echo/infer"


@pytest.fixture
def make(client: Make) -> Make:
    return lambda **options: client("sequence-classification", **options)


def tensor(*texts: Any, name: str = "text", **fields: Any) -> dict[str, Any]:
    return {"name": name, "shape": [len(texts)], "datatype": "BYTES", "data": list(texts)} | fields


def problem(client: TestClient, body: dict[str, Any], status: int = 400) -> str:
    answer = client.post(URL, json=body)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    return str(answer.json()["error"])


def test_each_row_gets_its_label_and_its_probabilities(make: Make) -> None:
    answer = make().post(URL, json={"id": "7", "inputs": [tensor("a", "b", "c")]}).json()
    assert (answer["model_name"], answer["id"]) == ("echo", "7")
    label, probabilities = answer["outputs"]
    assert label == {"name": "label", "datatype": "BYTES", "shape": [3], "data": ["fine", "good", "bad"]}
    assert (probabilities["datatype"], probabilities["shape"]) == ("FP32", [3, 3])
    high, low = pytest.approx(0.576117, abs=1e-6), pytest.approx(0.211942, abs=1e-6)  # softmax of one-hot logits
    assert probabilities["data"] == [low, high, low, low, low, high, high, low, low]


def test_without_an_id_none_is_given_back(make: Make) -> None:
    assert "id" not in make().post(URL, json={"inputs": [tensor("a")]}).json()


@pytest.mark.parametrize("data", [["a", "b"], [["a"], ["b"]]])
def test_rows_may_be_a_column_flat_or_nested(make: Make, data: list[Any]) -> None:
    answer = make().post(URL, json={"inputs": [tensor(*data, shape=[2, 1])]}).json()
    assert answer["outputs"][0]["data"] == ["fine", "good"]


def test_a_second_text_joins_the_first(make: Make) -> None:
    client = make()
    client.post(URL, json={"inputs": [tensor("q", name="text_pair"), tensor("a")]})
    assert client.served.seen == [{"text": "a", "text_pair": "q"}]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("wanted", "got"), [(["label"], ["label"]), ([], ["label", "probabilities"])])
def test_only_the_outputs_asked_for_come_back(make: Make, wanted: list[str], got: list[str]) -> None:
    body = {"inputs": [tensor("a")], "outputs": [{"name": name} for name in wanted]}
    assert [output["name"] for output in make().post(URL, json=body).json()["outputs"]] == got


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"inputs": [tensor("a", datatype="FP32")]}, "datatype 'FP32', it must be 'BYTES'"),
        ({"inputs": [tensor("a", shape=[2])]}, "stands for 2 strings, data holds 1"),
        ({"inputs": [tensor("a", shape=[1, 2])]}, "shape [1, 2]"),
        ({"inputs": [tensor("a", shape=[])]}, "shape []"),
        ({"inputs": [tensor(shape=[0])]}, "at least one row"),
        ({"inputs": [tensor("a", shape=[-1])]}, "shape [-1]"),
        ({"inputs": [tensor(1)]}, "row 0: int where a string belongs"),
        ({"inputs": [tensor("a", None)]}, "row 1: NoneType where a string belongs"),
        ({"inputs": [tensor(["a", "b"], shape=[1])]}, "row 0: list where a string belongs"),
        ({"inputs": [tensor("a", name="txt")]}, "Did you mean 'text'?"),
        ({"inputs": [tensor("a"), tensor("b")]}, "comes twice"),
        ({"inputs": [tensor("a", name="text_pair")]}, "'text' is missing"),
        ({"inputs": []}, "'text' is missing"),
        ({"inputs": [tensor("a", "b"), tensor("c", name="text_pair")]}, "differ in their number of rows"),
        ({"inputs": [tensor(*"abcdefghi")]}, "9 rows, 8 at most"),
        ({"inputs": [tensor("a", shape=["1"])]}, "inputs.0.shape.0"),
        ({"inputs": [tensor("a", parameters={"binary_data_size": 1})]}, "parameters are not supported"),
        ({"inputs": [tensor("a")], "outputs": [{"name": "labels"}]}, "Did you mean 'label'?"),
        ({"inputs": [tensor("a")], "output": []}, "Did you mean 'outputs'?"),
        ({}, "inputs: Field required"),
    ],
)
def test_a_body_that_does_not_fit_is_refused_with_what_is_wrong(make: Make, body: dict[str, Any], words: str) -> None:
    assert words in problem(make(), body)


def test_half_a_character_is_refused(make: Make) -> None:
    body = b'{"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["\\ud800"]}]}'
    answer = make().post(URL, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "not valid Unicode" in answer.json()["error"]


def test_malformed_json_is_refused(make: Make) -> None:
    answer = make().post(URL, content=b'{"inputs": [', headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "not valid JSON" in answer.json()["error"]


def test_metadata_names_inputs_outputs_and_labels(make: Make) -> None:
    client = make()
    metadata = client.get("/v2/models/echo").json()
    assert metadata["platform"] == "raytx_echo"
    assert [entry["name"] for entry in metadata["inputs"]] == ["text", "text_pair"]
    assert metadata["outputs"][1] == {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]}
    assert metadata["labels"] == ["bad", "fine", "good"]
    assert client.get("/v2").json()["name"] == "raytx"


def test_another_model_is_not_found(make: Make) -> None:
    client = make()
    for answer in (client.get("/v2/models/no"), client.get("/v2/models/no/ready")):
        assert answer.status_code == 404
        assert "'echo'" in answer.json()["error"]
    assert client.post("/v2/models/no/infer", json={"inputs": [tensor("a")]}).status_code == 404


def test_readiness_is_the_replicas_and_liveness_is_not(make: Make) -> None:
    client = make()
    urls = ("/v2/health/ready", "/v2/models/echo/ready", "/v2/health/live")
    assert [client.get(url).status_code for url in urls] == [200, 200, 200]
    client.served.is_ready = False  # type: ignore[attr-defined]
    assert [client.get(url).status_code for url in urls] == [503, 503, 200]
