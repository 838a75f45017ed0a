"""The tasks: rows to features, batches, metrics, requests and responses, in numpy, for any model plugin."""

from raytx.tasks.base import Features, Request, Response, Row, Runner, Task
from raytx.tasks.causal_lm import CausalLM
from raytx.tasks.sequence_classification import SequenceClassification

TASKS: dict[str, type[Task]] = {task.name: task for task in (CausalLM, SequenceClassification)}
"""The tasks that ship with the host, by name; a model plugin may bring a Task subclass of its own besides."""

__all__ = [
    "TASKS",
    "CausalLM",
    "Features",
    "Request",
    "Response",
    "Row",
    "Runner",
    "SequenceClassification",
    "Task",
]
