"""The wire protocols in which artifacts are served, by the name a task gives. Nothing here knows Ray."""

from raytx.protocols.application import FAILED, application
from raytx.protocols.base import Description, RequestError, Served, WireProtocol
from raytx.protocols.guard import is_loopback, key_digest
from raytx.protocols.open_inference import OPEN_INFERENCE
from raytx.protocols.openai import OPENAI

PROTOCOLS: dict[str, WireProtocol] = {"openai": OPENAI, "open-inference": OPEN_INFERENCE}
"""By Task.protocol."""

__all__ = [
    "FAILED",
    "OPENAI",
    "OPEN_INFERENCE",
    "PROTOCOLS",
    "Description",
    "RequestError",
    "Served",
    "WireProtocol",
    "application",
    "is_loopback",
    "key_digest",
]
