"""A plugin with models of no weights: one continues a prompt by repeating it, one classifies a text by its first byte.

Answers are known without a model, every request has its own, and they come as slowly as `step_s` says.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raytx import hookimpl
from raytx.artifact import GOLDEN, Artifact, Golden, publish
from raytx.components import ExportConfig, ModelConfig
from raytx.tasks import TASKS, CausalLM, SequenceClassification, Task
from raytx.testing import FakeTokenizer

RAYTX_API = 1
LABELS = ["bad", "fine", "good"]
POISON = "\a"
"""A text that makes the model fail."""
CONTEXT = 200


class EchoModel(ModelConfig):
    """A model that repeats its prompt, or sorts texts by their first byte."""

    type: Literal["echo"] = "echo"
    task: Literal["causal-lm", "sequence-classification"]
    """Which of the two."""

    def task_class(self) -> type[Task]:
        return TASKS[self.task]

    def build(self) -> Any:
        return Echo(self.task)


class Echo:
    """What the config builds."""

    def __init__(self, name: str) -> None:
        self.name = name

    def task(self, directory: Path) -> Task:
        if self.name == "causal-lm":
            return CausalLM(FakeTokenizer(), max_length=CONTEXT)
        return SequenceClassification(FakeTokenizer(), max_length=CONTEXT, labels=LABELS)


class EchoExport(ExportConfig):
    """A directory with nothing in it."""

    type: Literal["echo"] = "echo"
    step_s: float = 0.0
    """Seconds that each forward pass takes."""
    trace: str | None = None
    """File that gets a line for each forward pass."""

    def build(self) -> Any:
        return EchoExporter(self)


class EchoExporter:
    """What the config builds."""

    def __init__(self, config: EchoExport) -> None:
        self.config = config

    def load(self, directory: Path, model: Any, compressors: list[Any]) -> EchoRunner:
        return EchoRunner(self.config)


class EchoRunner:
    """The forward pass. The cache is the prompts and how much of them was said."""

    def __init__(self, config: EchoExport | None = None) -> None:
        self.config = config or EchoExport()

    def logits(self, features: dict[str, Any]) -> np.ndarray:
        self._work(features["input_ids"])
        first = features["input_ids"][:, 0].astype(np.int64)
        return np.eye(len(LABELS), dtype=np.float32)[first % len(LABELS)]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, np.ndarray]:
        self._work(prompts)
        return self._say(prompts, 0)

    def step(self, cache: Any, tokens: np.ndarray) -> tuple[Any, np.ndarray]:
        prompts, said = cache
        self._work([[]])
        return self._say(prompts, said)

    def _say(self, prompts: Sequence[Sequence[int]], said: int) -> tuple[Any, np.ndarray]:
        logits: np.ndarray = np.zeros((len(prompts), len(FakeTokenizer())), dtype=np.float32)
        for row, prompt in enumerate(prompts):
            logits[row, prompt[said % len(prompt)]] = 50.0
        return (prompts, said + 1), logits

    def _work(self, rows: Any) -> None:
        time.sleep(self.config.step_s)
        if self.config.trace:
            with open(self.config.trace, "a", encoding="utf-8") as file:
                file.write(f"{os.getpid()} {len(rows)}\n")
        if any(ord(POISON) in list(row) for row in rows):
            raise ValueError("poisoned")


def write_artifact(directory: Path, task: str, *, name: str = "echo", **options: Any) -> Path:
    """Publish an artifact of the plugin, with golden outputs."""
    config = EchoModel(task=task)  # type: ignore[arg-type]
    staging = directory / "staging"
    staging.mkdir(parents=True)
    (staging / "weights.txt").write_text("none", encoding="utf-8")
    features = {"input_ids": np.array([[98, 99], [99, 257]]), "attention_mask": np.array([[1, 1], [1, 0]])}
    Golden(features, EchoRunner().logits(features)).save(staging / GOLDEN)
    return publish(
        staging,
        directory / name,
        Artifact(
            name=name,
            task=task,
            model=config.model_dump(),
            exporter=EchoExport(**options).model_dump(),
            compression=[],
            plugins={"raytx_echo": "1.0"},
            metrics={},
            golden_difference=0.0,
            lineage={},
            files={},
            labels=config.build().task(staging).label_names(),
        ),
    )


@hookimpl
def raytx_model() -> list[type[ModelConfig]]:
    return [EchoModel]


@hookimpl
def raytx_export() -> list[type[ExportConfig]]:
    return [EchoExport]
