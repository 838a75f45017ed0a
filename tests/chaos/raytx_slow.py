"""A plugin of things that take their time: a decoder that is slow in each phase of a run, and an export that is.

Where each phase is entered, a file of its name is touched, so that a test knows when to strike.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar, Literal

from raytx import hookimpl, pulse, saving
from raytx.components import Exportable, ExportConfig, Exporter, Model, ModelConfig
from raytx_torch.decoder import DecoderConfig

RAYTX_API = 1
LONG_EVERY = 20


class Slow(DecoderConfig):
    """A small decoder that sleeps; times are in seconds."""

    plugins: ClassVar[tuple[str, ...]] = ("raytx_hf", "raytx_torch")
    type: Literal["slow"] = "slow"
    notes: str = ""
    """Directory for the files that tell of phases."""
    start_s: float = 0.0
    first_s: float = 0.0
    """Of the first forward pass of a process."""
    step_s: float = 0.0
    """Of every forward pass in training; one in twenty takes four times as long."""
    evaluation_s: float = 0.0
    """Of every forward pass in evaluation."""
    write_s: float = 0.0
    """Of every file of a checkpoint."""

    def _component(self) -> ModelConfig:
        mine = set(Slow.model_fields) - set(DecoderConfig.model_fields)
        fields = self.model_dump(exclude={"type", *mine}) | {"tokenizer": self.tokenizer}
        return DecoderConfig.model_validate(fields)._component()

    def build(self) -> Model:
        return Sleepy(super().build(), self)  # type: ignore[return-value]


class Sleepy:
    """The decoder's model, which sleeps in ranks, and nowhere else."""

    def __init__(self, model: Any, config: Slow) -> None:
        self.model, self.config, self.passes = model, config, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def structure(self, directory: Path, **options: Any) -> Any:
        module = self.model.structure(directory, **options)
        if pulse._pen is not None:  # only ranks have one
            self._sleep("start", self.config.start_s)
            self._write_slowly()
            module.register_forward_pre_hook(self._before)
        return module

    def _before(self, module: Any, given: Any) -> None:
        if not module.training:
            return self._sleep("evaluation", self.config.evaluation_s)
        self.passes += 1
        if self.passes == 1:
            self._sleep("first", self.config.first_s)
        self._sleep("step", self.config.step_s * (4 if self.passes % LONG_EVERY == 0 else 1))

    def _write_slowly(self) -> None:
        plain = saving.write_safetensors

        def write(*given: Any, **options: Any) -> Any:
            self._sleep("write", self.config.write_s)
            return plain(*given, **options)

        saving.write_safetensors = write  # type: ignore[attr-defined]

    def _sleep(self, phase: str, seconds: float) -> None:
        if seconds:
            Path(self.config.notes, phase).touch()
            time.sleep(seconds)


class SlowExport(ExportConfig):
    """An export that is never done."""

    type: Literal["slow-export"] = "slow-export"
    notes: str = ""

    def build(self) -> Exporter:
        return Endless(self.notes)  # type: ignore[return-value]


class Endless:
    def __init__(self, notes: str) -> None:
        self.notes = notes

    def save(self, exportable: Exportable, directory: Path) -> None:
        Path(self.notes, "export").touch()
        time.sleep(600)


@hookimpl
def raytx_model() -> list[type[ModelConfig]]:
    return [Slow]


@hookimpl
def raytx_export() -> list[type[ExportConfig]]:
    return [SlowExport]
