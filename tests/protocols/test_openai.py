"""OpenAI's completions API, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from raytx.protocols import RequestError

Make = Callable[..., TestClient]
URL = "/v1/completions"


@pytest.fixture
def make(client: Make) -> Make:
    return lambda **options: client("causal-lm", **options)


def ask(client: TestClient, **fields: Any) -> Any:
    return client.post(URL, json={"model": "echo", "prompt": "abc", "temperature": 0} | fields)


def problem(client: TestClient, status: int, **fields: Any) -> dict[str, Any]:
    """Ask, demand a status, and return the error, which must have the shape OpenAI's clients read."""
    answer = ask(client, **fields)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def events(text: str) -> list[Any]:
    """Return the events of a stream; [DONE] stays a string."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_a_completion_has_openais_shape_and_counts_tokens(make: Make) -> None:
    answer = ask(make(), max_tokens=5).json()
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "echo"
    assert answer["choices"] == [{"index": 0, "text": "abcab", "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


def test_without_max_tokens_sixteen_are_generated(make: Make) -> None:
    assert ask(make()).json()["usage"]["completion_tokens"] == 16


def test_null_fields_mean_the_defaults(make: Make) -> None:
    client = make()
    nulls = dict.fromkeys(
        ["max_tokens", "top_p", "seed", "stop", "stream", "n", "echo", "logit_bias", "stream_options"]
    )
    assert ask(client, **nulls).status_code == 200
    assert ask(client, temperature=None).status_code == 200
    assert client.served.seen[-1]["temperature"] == 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["abab"]),
        (["ab", "xyz"], ["abab", "xyzx"]),
        ([97, 98], ["abab"]),
        ([[97, 98], [120]], ["abab", "xxxx"]),
    ],
)
def test_a_prompt_may_be_text_or_tokens_one_or_several(make: Make, prompt: Any, texts: list[str]) -> None:
    choices = ask(make(), prompt=prompt, max_tokens=4).json()["choices"]
    assert [choice["text"] for choice in choices] == texts
    assert [choice["index"] for choice in choices] == list(range(len(texts)))


def test_an_empty_prompt_starts_a_document(make: Make) -> None:
    answer = ask(make(), prompt="").json()
    assert answer["usage"]["prompt_tokens"] == 1
    assert answer["choices"][0]["finish_reason"] == "stop"  # the echo of the end of sequence


@pytest.mark.parametrize("stop", ["ca", ["zzz", "ca"]])
def test_a_stop_word_ends_the_answer_before_it(make: Make, stop: Any) -> None:
    choice = ask(make(), stop=stop, max_tokens=20).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")


@pytest.mark.parametrize("prompt", ["abcdef", "grün €uro 🙂 "])
@pytest.mark.parametrize("stop", [None, "e", "ro 🙂"])
def test_streamed_pieces_join_to_the_whole_answer(make: Make, prompt: str, stop: str | None) -> None:
    client = make()
    fields = {"prompt": prompt, "max_tokens": 40, "stop": stop}
    whole = ask(client, **fields).json()["choices"][0]
    answer = ask(client, stream=True, **fields)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(answer.text)
    assert done == "[DONE]"
    assert len(chunks) > 1
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole["finish_reason"]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert "usage" not in chunks[0]


def test_a_stream_ends_with_usage_when_asked(make: Make) -> None:
    *chunks, last, done = events(ask(make(), stream=True, max_tokens=3, stream_options={"include_usage": True}).text)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert all(chunk["usage"] is None for chunk in chunks)


def test_a_refused_stream_is_a_plain_4xx(make: Make) -> None:
    assert problem(make(), 400, stream=True, prompt="a" * 300)["code"] == "context_length_exceeded"


def test_a_stream_that_fails_half_way_says_so_and_is_not_done(make: Make) -> None:
    fault = RequestError(504, "too late", code="timeout")
    *chunks, last = events(ask(make(fault=fault, after=2), stream=True).text)
    assert len(chunks) == 2
    assert last["error"]["message"] == "too late"


def test_one_prompt_can_be_streamed_at_a_time(make: Make) -> None:
    assert "one prompt" in problem(make(), 400, stream=True, prompt=["a", "b"])["message"]


def test_prompt_and_max_tokens_beyond_the_context_are_refused_with_both_numbers(make: Make) -> None:
    error = problem(make(), 400, prompt="a" * 190, max_tokens=11)
    assert error["code"] == "context_length_exceeded"
    assert all(number in error["message"] for number in ("190", "11", "200"))
    assert ask(make(), prompt="a" * 190, max_tokens=10).status_code == 200


def test_max_tokens_beyond_what_is_served_are_refused(make: Make) -> None:
    error = problem(make(max_tokens=50), 400, max_tokens=51)
    assert (error["param"], "50" in error["message"]) == ("max_tokens", True)


def test_token_ids_outside_the_vocabulary_are_refused(make: Make) -> None:
    assert "258" in problem(make(), 400, prompt=[97, 258])["message"]
    assert problem(make(), 400, prompt=[-1])["param"] == "prompt"


def test_more_prompts_than_a_batch_are_refused(make: Make) -> None:
    assert "2 at most" in problem(make(max_batch_size=2), 400, prompt=["a", "b", "c"])["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("best_of", 3),
        ("echo", True),
        ("logprobs", 0),
        ("suffix", "end"),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("logit_bias", {"50": 1}),
    ],
)
def test_what_cannot_be_obeyed_is_refused_and_not_ignored(make: Make, field: str, value: Any) -> None:
    error = problem(make(), 400, **{field: value})
    assert error["param"] == field
    assert "not supported" in error["message"]


def test_default_values_of_unsupported_fields_are_taken(make: Make) -> None:
    assert ask(make(), n=1, best_of=1, echo=False, frequency_penalty=0, logit_bias={}, user="me").status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"stream": "yes"}, "stream"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 65}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_wrong_types_and_values_are_refused_by_name(make: Make, fields: dict[str, Any], param: str) -> None:
    error = problem(make(), 400, **fields)
    assert error["param"] == param
    assert param in error["message"]
    assert error["type"] == "invalid_request_error"


def test_the_nearest_field_is_suggested_for_an_unknown_one(make: Make) -> None:
    assert "Did you mean 'max_tokens'?" in problem(make(), 400, max_tokns=5)["message"]


def test_the_model_must_be_the_one_that_is_served(make: Make) -> None:
    error = problem(make(), 404, model="ecco")
    assert error["code"] == "model_not_found"
    assert "'echo'" in error["message"]


def test_models_are_listed_and_described(make: Make) -> None:
    client = make()
    listed = client.get("/v1/models").json()
    assert listed == {
        "object": "list",
        "data": [{"id": "echo", "object": "model", "created": 1, "owned_by": "raytx"}],
    }
    assert client.get("/v1/models/echo").json() == listed["data"][0]
    assert client.get("/v1/models/other").status_code == 404


def test_sampling_options_reach_the_task(make: Make) -> None:
    client = make()
    ask(client, temperature=0.7, top_p=0.9, top_k=3, seed=-1)
    seen = client.served.seen[-1]  # type: ignore[attr-defined]
    assert (seen["temperature"], seen["top_p"], seen["top_k"], seen["seed"]) == (0.7, 0.9, 3, 2**64 - 1)


def test_a_temperature_too_small_to_divide_by_is_greedy(make: Make) -> None:
    assert ask(make(), temperature=1e-308, max_tokens=3).json()["choices"][0]["text"] == "abc"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not valid JSON"),
        (b"", "body must be a JSON object"),
        (b"[1]", "body must be a JSON object"),
        (b"[" * 100_000, "parsing the body"),
        (b'{"model": "echo", "prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"model": "echo", "prompt": "\\ud800"}', "not valid Unicode"),
        (b'{"model": "\\udfff", "prompt": "a"}', "not valid Unicode"),
        (b"\xff\xfe", "body"),
    ],
)
def test_bodies_that_are_no_request_get_a_400_that_says_why(make: Make, body: bytes, words: str) -> None:
    answer = make().post(URL, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]


def test_a_body_of_another_content_type_is_refused_with_what_to_send(make: Make) -> None:
    answer = make().post(URL, content=b'{"model": "echo", "prompt": "a"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 400
    assert "application/json" in answer.json()["error"]["message"]


def test_the_request_is_in_the_openapi_description(make: Make) -> None:
    schema = make().get("/openapi.json").json()["components"]["schemas"]["CompletionRequest"]
    assert schema["required"] == ["model", "prompt"]
    assert schema["properties"]["seed"]["description"] == "Makes sampling repeatable."
