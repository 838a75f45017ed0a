"""What a task is: the one class that knows rows, features, metrics, requests and responses of one kind of work.

Tasks speak numpy, so that every model plugin can use them without importing another plugin, and every exported form is
read by the same code that prepared the training data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from raytx.errors import ArtifactError
from raytx.files import read_json, write_json

Row = dict[str, Any]
"""One record of a source, before the task has seen it."""
Features = dict[str, Any]
"""One encoded sample (lists of integers, numbers), or a collated batch of them (numpy arrays)."""
Request = dict[str, Any]
Response = dict[str, Any]

IGNORED = -100
"""The label of a position that is no target; torch's cross entropy skips it."""

TASK_FILE = "raytx_task.json"


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean cross entropy in nats of logits (..., classes) against labels (...), ignored ones left out."""
    kept = labels != IGNORED
    logits, labels = logits[kept].astype(np.float64), labels[kept]
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    return float((log_sum - np.take_along_axis(logits, labels[..., None], -1)[..., 0]).mean())


class Runner(Protocol):
    """The forward pass of one exported or live model, in numpy. Stateless between calls; cache is the caller's."""

    def logits(self, features: Features) -> np.ndarray:
        """Return float32 logits of a collated batch: (batch, length, vocabulary) or (batch, labels)."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, np.ndarray]:
        """Read prompts of any lengths; return the cache and the next token's logits (batch, vocabulary)."""

    def step(self, cache: Any, tokens: np.ndarray) -> tuple[Any, np.ndarray]:
        """Append one token (batch,) to each sequence; return the cache and the next token's logits."""


class Task(ABC):
    """One kind of work. Subclasses hold the processor (a tokenizer, labels) and are immutable once built."""

    name: ClassVar[str]
    protocol: ClassVar[Literal["openai", "open-inference"]]
    """The wire protocol its artifacts are served in."""
    metrics_mode: ClassVar[dict[str, Literal["min", "max"]]]
    """The metrics it computes and which way is better; the first is the default metric."""
    needs_logits: ClassVar[bool]
    """Whether its metrics need logits, or the loss is enough."""
    required_columns: ClassVar[tuple[str, ...]]
    """The columns a row must have."""

    def __init__(self, tokenizer: Any, *, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    # ---- what is learned from the data and kept beside the tokenizer

    @classmethod
    @abstractmethod
    def fit(cls, rows: Callable[[], Iterator[Row]]) -> dict[str, Any]:
        """Return what must be learned from the training rows (label names), as JSON."""

    def state(self) -> dict[str, Any]:
        """Return the JSON from which, with the tokenizer, the task is rebuilt."""
        return {"task": self.name, "max_length": self.max_length}

    def save(self, directory: Path) -> None:
        write_json(directory / TASK_FILE, self.state())

    @classmethod
    def load(cls, directory: Path, tokenizer: Any) -> Task:
        """Rebuild the task that `save` wrote; raise ArtifactError when the directory holds another."""
        path = directory / TASK_FILE
        if not path.is_file():
            raise ArtifactError(f"{directory}: no {TASK_FILE}; this is not a raytx processor or artifact")
        state = dict(read_json(path))
        if (name := state.pop("task", None)) != cls.name:
            raise ArtifactError(f"{path}: task is {name!r}, {cls.name!r} was expected")
        return cls(tokenizer, **state)

    # ---- training

    @abstractmethod
    def features(self, rows: Iterable[Row], rejected: Callable[[int, str], None]) -> Iterator[Features]:
        """Encode rows, and pack them where the task packs; call rejected(row index, reason) for those that cannot be.

        Every feature dict has "num_targets", the number of labels its loss averages over.
        """

    @abstractmethod
    def collate(self, samples: Sequence[Features]) -> Features:
        """Pad samples into one batch of numpy arrays, without "num_targets"."""

    @abstractmethod
    def loss(self, batch: Features, logits: np.ndarray) -> float:
        """Return the mean cross entropy over a batch's targets, in nats: what the module's own loss must be."""

    @abstractmethod
    def evaluation(self, batch: Features, loss: float, logits: np.ndarray | None, num_targets: int) -> Features:
        """Return what the metrics need of one batch, as small arrays of one length."""

    @abstractmethod
    def metrics(self, parts: Sequence[Features]) -> dict[str, float]:
        """Compute metrics over the whole split from all ranks' evaluation parts; always has "loss"."""

    @abstractmethod
    def baseline(self, samples: Iterable[Features]) -> tuple[str, dict[str, float]]:
        """Return what a model that learned only frequencies would score on the training samples, and its name."""

    @abstractmethod
    def golden(self, samples: Sequence[Features]) -> Features:
        """Collate a few samples as a server would get them (one per row, padded, no labels), to record answers to."""

    # ---- serving

    @abstractmethod
    def demo(self, samples: Sequence[Features]) -> list[tuple[Request, str]]:
        """Return requests made of a few held-out samples, each with the words that show it to a user."""

    @abstractmethod
    def show(self, response: Response) -> str:
        """Return the words that show a response to a user."""

    @abstractmethod
    def predict(self, runner: Runner, requests: Sequence[Request]) -> list[Response]:
        """Answer validated requests with one batch."""

    def stream(self, runner: Runner, request: Request) -> Iterator[Response]:
        """Answer one request piece by piece; tasks that do not generate refuse."""
        raise NotImplementedError(f"{self.name} does not stream")

    def label_names(self) -> list[str] | None:
        """Return the names of the classes, or None for tasks without."""
        return None
