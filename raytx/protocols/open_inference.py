"""The Open Inference Protocol, version 2, over a sequence classifier: text in, a label and probabilities out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import Field

from raytx import __version__
from raytx.errors import did_you_mean
from raytx.protocols.base import Body, Description, Part, RequestError, Served, WireProtocol
from raytx.sections import Serving
from raytx.tasks import Request, Response, Task

INPUTS = ("text", "text_pair")
OUTPUTS = ("label", "probabilities")


class InputTensor(Part):
    """One input: a string for each row."""

    name: str
    """text, or text_pair for the second text of each row."""
    shape: list[int] = Field(max_length=8)
    """[rows] or [rows, 1]."""
    datatype: str
    """BYTES, which in JSON is strings."""
    parameters: dict[str, Any] | None = None
    """None are known."""
    data: list[Any]
    """The strings, flat or nested as the shape says."""


class RequestedOutput(Part):
    """An output that is wanted."""

    name: str
    """label or probabilities."""
    parameters: dict[str, Any] | None = None
    """None are known."""


class InferRequest(Body):
    """A request for predictions."""

    id: str | None = None
    """Given back with the answer."""
    parameters: dict[str, Any] | None = None
    """None are known."""
    inputs: list[InputTensor]
    """text, and text_pair where rows are pairs."""
    outputs: list[RequestedOutput] | None = None
    """The outputs that are wanted; all of them when left out."""


def add_routes(app: FastAPI, served: Served) -> None:
    """Add the routes; `served` answers for them."""

    @app.get("/v2", tags=["open inference"])
    async def server() -> dict[str, Any]:
        """Describe the server."""
        return {"name": "raytx", "version": __version__, "extensions": []}

    @app.get("/v2/health/live", tags=["open inference"])
    async def live() -> dict[str, bool]:
        """Answer 200 while the server runs."""
        return {"live": True}

    @app.get("/v2/health/ready", tags=["open inference"])
    async def ready() -> JSONResponse:
        """Answer 200 once the model can be asked, 503 before."""
        is_ready = await served.ready()
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @app.get("/v2/models/{name}/ready", tags=["open inference"])
    async def model_ready(name: str) -> JSONResponse:
        """Answer 200 once the model can be asked, 503 before."""
        _check_model(name, served.description)
        is_ready = await served.ready()
        return JSONResponse({"name": name, "ready": is_ready}, 200 if is_ready else 503)

    @app.get("/v2/models/{name}", tags=["open inference"])
    async def model(name: str) -> dict[str, Any]:
        """Describe the model's inputs and outputs."""
        _check_model(name, served.description)
        return _metadata(served.description)

    @app.post("/v2/models/{name}/infer", tags=["open inference"])
    async def infer(name: str, body: InferRequest) -> JSONResponse:
        """Classify texts. A text longer than the model was trained on is cut, as it was in training."""
        _check_model(name, served.description)
        requests = _requests(body, served.settings)
        wanted = _wanted(body)
        responses = await served.predict(requests)
        named = {} if body.id is None else {"id": body.id}
        tensors = _tensors(responses)
        return JSONResponse({"model_name": name, **named, "outputs": [tensors[output] for output in wanted]})


def admit(task: Task, request: Request, settings: Serving) -> Request:
    """Take every request: the task cuts a text to its length, as it did in training."""
    return request


def error(problem: RequestError) -> dict[str, Any]:
    """Return a problem in the protocol's shape."""
    return {"error": problem.message}


def example(description: Description) -> tuple[str, dict[str, Any]]:
    """Return path and body of a request that works."""
    text = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["A lovely place, we will come again."]}
    return f"/v2/models/{description.name}/infer", {"inputs": [text]}


OPEN_INFERENCE = WireProtocol(add_routes=add_routes, admit=admit, error=error, request=InferRequest, example=example)


# ------------------------------------------------------------------------------------------------------- request


def _requests(body: InferRequest, settings: Serving) -> list[Request]:
    """Turn input tensors into one task request for each row."""
    _check_parameters("the request", body.parameters)
    columns: dict[str, list[str]] = {}
    for tensor in body.inputs:
        if tensor.name not in INPUTS:
            near = did_you_mean(tensor.name, INPUTS)
            raise RequestError(400, f"no input {tensor.name[:100]!r}.{near} Inputs are {' and '.join(INPUTS)}")
        if tensor.name in columns:
            raise RequestError(400, f"input {tensor.name!r} comes twice")
        columns[tensor.name] = _strings(tensor, settings)
    if "text" not in columns:
        raise RequestError(400, "input 'text' is missing")
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise RequestError(400, f"inputs differ in their number of rows: {lengths}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _strings(tensor: InputTensor, settings: Serving) -> list[str]:
    """Return a tensor's rows; raise RequestError when shape, datatype and data do not agree."""
    name, shape = f"input {tensor.name!r}", tensor.shape
    _check_parameters(name, tensor.parameters)
    if tensor.datatype != "BYTES":
        raise RequestError(400, f"{name}: datatype {tensor.datatype[:20]!r}, it must be 'BYTES' (strings)")
    if len(shape) not in {1, 2} or shape[0] < 1 or shape[1:] not in ([], [1]):
        raise RequestError(400, f"{name}: shape {shape}, it must be [rows] or [rows, 1] with at least one row")
    if shape[0] > settings.max_batch_size:
        raise RequestError(400, f"{name}: {shape[0]} rows, {settings.max_batch_size} at most (serving.max_batch_size)")
    values = list(_flat(tensor.data))
    if len(values) != shape[0]:
        raise RequestError(400, f"{name}: shape {shape} stands for {shape[0]} strings, data holds {len(values)}")
    return [_string(value, f"{name}, row {row}") for row, value in enumerate(values)]


def _flat(data: Sequence[Any]) -> Iterator[Any]:
    """Yield the elements of data written flat, or nested as [rows, 1] is."""
    for value in data:
        if isinstance(value, list) and len(value) == 1:
            yield value[0]
        else:
            yield value


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(400, f"{where}: {type(value).__name__} where a string belongs")
    return value


def _wanted(body: InferRequest) -> list[str]:
    for output in body.outputs or ():
        _check_parameters(f"output {output.name[:100]!r}", output.parameters)
        if output.name not in OUTPUTS:
            near = did_you_mean(output.name, OUTPUTS)
            raise RequestError(400, f"no output {output.name[:100]!r}.{near} Outputs are {' and '.join(OUTPUTS)}")
    return list(dict.fromkeys(output.name for output in body.outputs or ())) or list(OUTPUTS)


def _check_parameters(where: str, parameters: dict[str, Any] | None) -> None:
    if parameters:
        raise RequestError(400, f"{where}: parameters are not supported, leave out {next(iter(parameters))[:100]!r}")


def _check_model(name: str, description: Description) -> None:
    if name != description.name:
        near = did_you_mean(name, [description.name])
        raise RequestError(404, f"no model {name[:100]!r} here.{near} This server has {description.name!r}")


# ------------------------------------------------------------------------------------------------------ response


def _metadata(description: Description) -> dict[str, Any]:
    """Return the model's metadata; -1 is any number of rows. "labels" name the columns, beyond the protocol."""
    labels = description.labels or ()
    return {
        "name": description.name,
        "platform": f"raytx_{description.format}",
        "inputs": [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in INPUTS],
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(labels)]},
        ],
        "labels": list(labels),
    }


def _tensors(responses: Sequence[Response]) -> dict[str, dict[str, Any]]:
    shares = np.asarray([response["probabilities"] for response in responses], dtype=np.float32)
    return {
        "label": {
            "name": "label",
            "datatype": "BYTES",
            "shape": [len(responses)],
            "data": [response["label"] for response in responses],
        },
        "probabilities": {
            "name": "probabilities",
            "datatype": "FP32",
            "shape": list(shares.shape),
            "data": shares.ravel().tolist(),
        },
    }
