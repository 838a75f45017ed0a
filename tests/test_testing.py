"""The conformance checks: each promise, broken on purpose, is noticed and named."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from pydantic import Field

from raytx.components import Component, CompressionConfig, DataConfig, ExportConfig, ModelConfig, StrategyConfig
from raytx.layout import Layout
from raytx.registry import registry
from raytx.testing import (
    check_component,
    check_compression,
    check_config,
    check_data,
    check_engine,
    check_export,
    check_model,
    check_strategy,
    fake_plugin,
    installed,
    tiny_model,
    tiny_recipe,
    tiny_rows,
)


def broken(config: Component, told: str, check: Any = check_component) -> None:
    with pytest.raises(AssertionError) as caught:
        check(config)
    assert told in str(caught.value)
    assert str(caught.value).startswith(f"{config.kind} {config.type!r}: "), "it names the component"


# ---- configs


class Loose(DataConfig, extra="allow"):
    """Takes any key."""

    type: Literal["loose"] = "loose"


class Thawed(DataConfig, frozen=False):
    """Can be changed."""

    type: Literal["thawed"] = "thawed"


class Unnamed(DataConfig):
    """Has no name of its own."""

    type: str = "unnamed"


class Silent(DataConfig):
    type: Literal["silent"] = "silent"


class Bare(DataConfig):
    """Has a field that says nothing."""

    type: Literal["bare"] = "bare"
    depth: int = 3


class Forgetful(DataConfig):
    """Is another config after a trip through JSON."""

    type: Literal["forgetful"] = "forgetful"
    number: int = Field(3, exclude=True)
    """Is left out of the dump."""


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (Loose(), "unknown keys must be forbidden"),
        (Thawed(), "it must be frozen"),
        (Unnamed(), "type must be declared as"),
        (Silent(), "has no docstring"),
        (Bare(), "fields without a description: depth"),
        (Forgetful(number=4), "its dump, read back, is another config"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Component) else "",
)
def test_a_config_that_breaks_a_rule_is_named(config: Component, told: str) -> None:
    broken(config, told, check_config)


def test_a_module_that_imports_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "heavy_plugin.py").write_text(
        "import torch\nfrom typing import Literal\nfrom raytx.components import DataConfig\n"
        'class Heavy(DataConfig):\n    """Heavy."""\n    type: Literal["heavy"] = "heavy"\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import heavy_plugin  # type: ignore[import-not-found]

    broken(heavy_plugin.Heavy(), "importing heavy_plugin imports torch", check_config)


# ---- data


class Rows(DataConfig):
    """Rows with a fault."""

    type: Literal["rows"] = "rows"
    fault: str | None = None
    """Which one."""

    def build(self) -> Any:
        return RowsSource(self.fault)


class RowsSource:
    def __init__(self, fault: str | None) -> None:
        self.fault = fault

    def fingerprint(self) -> str:
        return str(random.random()) if self.fault == "fingerprint" else "a"

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        rows = tiny_rows()
        if self.fault == "order":
            random.shuffle(rows)
        if self.fault == "empty":
            return
        yield from rows[:20] if split == "train" else rows[19 if self.fault == "overlap" else 20 :]

    def remarks(self) -> Any:
        return "one" if self.fault == "remarks" else ["one"]


def test_a_sound_source_passes() -> None:
    check_data(Rows())


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("order", "in another order, or differ"),
        ("empty", "the train split is empty"),
        ("overlap", "1 rows are in both splits"),
        ("fingerprint", "fingerprint() changes"),
        ("remarks", "remarks() is a list of text"),
    ],
)
def test_a_source_that_breaks_a_promise_is_named(fault: str, told: str) -> None:
    broken(Rows(fault=fault), told, check_data)


# ---- model


class Faulty(ModelConfig):
    """The tiny decoder with a fault."""

    type: Literal["faulty"] = "faulty"
    fault: str | None = None
    """Which one."""

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"save_pretrained"})

    def task_class(self) -> Any:
        return self._decoder().task_class()

    def size(self) -> Any:
        size = self._decoder().size()
        return type(size)(**(vars(size) | {"parameters": 2 * size.parameters})) if self.fault == "size" else size

    def build(self) -> Any:
        return FaultyBody(self._decoder().build(), self.fault)

    def _decoder(self) -> Any:
        return registry().parse("model", tiny_model())


class FaultyBody:
    """Passes everything on, but for the fault."""

    def __init__(self, body: Any, fault: str | None) -> None:
        self.body, self.fault = body, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self.body, name)

    def module(self, directory: Path, **options: Any) -> Any:
        import torch

        if self.fault == "seed":
            options["seed"] = random.getrandbits(31)
        module = self.body.module(directory, **options)
        if self.fault == "gradient":
            module.register_parameter("unused", torch.nn.Parameter(torch.zeros(3)))
        if self.fault == "loss":
            module.register_forward_hook(lambda layer, given, output: _scaled(output))
        if self.fault == "leak":
            module.register_forward_pre_hook(lambda layer, given, named: (given, _straight(named)), with_kwargs=True)
        return module

    def weights(self, directory: Path, **options: Any) -> Any:
        if self.fault == "weights":
            options["seed"] = 1
        return self.body.weights(directory, **options)

    def structure(self, directory: Path, **options: Any) -> Any:
        return self.body.module(directory) if self.fault == "structure" else self.body.structure(directory, **options)

    def runner(self, module: Any) -> Any:
        return FaultyRunner(self.body.runner(module), self.fault)

    def load(self, directory: Path) -> Any:
        module = self.body.load(directory)
        if self.fault == "load":
            module.lm_head.weight.data += 0.1
        return module


def _scaled(output: Any) -> Any:
    if output.loss is not None:
        output.loss = output.loss * 2
    return output


def _straight(named: dict[str, Any]) -> dict[str, Any]:
    """Number the positions through, as if a sample were one document."""
    import torch

    if "attention_mask" in named:
        return named
    return named | {"position_ids": torch.arange(named["input_ids"].shape[1])[None]}


class FaultyRunner:
    def __init__(self, runner: Any, fault: str | None) -> None:
        self.runner, self.fault = runner, fault

    def logits(self, features: dict[str, Any]) -> np.ndarray:
        logits: np.ndarray = self.runner.logits(features)
        if self.fault == "neighbours":
            return logits + np.float32(len(logits))
        return logits.astype(np.float64) if self.fault == "dtype" else logits

    def prefill(self, prompts: Any) -> Any:
        return self.runner.prefill(prompts)

    def step(self, cache: Any, tokens: np.ndarray) -> Any:
        return self.runner.step(cache, tokens + 1 if self.fault == "step" else tokens)


def test_a_sound_model_passes() -> None:
    check_model(Faulty())


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("size", "parameters, "),
        ("seed", "other weights under the same seed"),
        ("structure", "must be on the meta device"),
        ("weights", "weights() gives other values"),
        ("gradient", "trained parameters without a gradient: unused"),
        ("loss", "the mean over its targets is"),
        ("dtype", "runner.logits gives float64"),
        ("leak", "a packed document sees the one before it"),
        ("neighbours", "with what it is batched with"),
        ("step", "after 1 single steps the logits are"),
        ("load", "load() gives logits"),
    ],
)
def test_a_model_that_breaks_a_promise_is_named(fault: str, told: str) -> None:
    broken(Faulty(fault=fault), told, check_model)


# ---- compression


class Halving(CompressionConfig):
    """Halves the output head, with a fault."""

    type: Literal["halving"] = "halving"
    fault: str | None = None
    """Which one."""

    def build(self) -> Any:
        return HalvingCompressor(self.fault)


class HalvingCompressor:
    def __init__(self, fault: str | None) -> None:
        self.fault = fault

    def prepare(self, module: Any) -> Any:
        return None if self.fault == "prepare" else module

    def convert(self, module: Any) -> Any:
        module.model.norm.register_buffer("factor", module.model.norm.weight.new_tensor(0.5))
        module.model.norm.register_forward_hook(lambda layer, given, output: output * layer.factor)
        return module

    def restore(self, module: Any) -> Any:
        if self.fault == "structure":
            module.model.norm.register_buffer("factor", module.model.norm.weight.new_tensor(0.0))
            return module
        return self.convert(module)


def test_a_sound_compression_passes() -> None:
    check_compression(Halving())


def test_a_compression_that_breaks_a_promise_is_named() -> None:
    broken(Halving(fault="prepare"), "prepare() returned nothing", check_compression)
    broken(Halving(fault="structure"), "restore() and the saved state give logits", check_compression)


# ---- export


class Copying(ExportConfig):
    """The hf export with a fault."""

    type: Literal["copying"] = "copying"
    fault: str | None = None
    """Which one."""

    def build(self) -> Any:
        return CopyingExporter(registry().find("export", "hf")().build(), self.fault)


class CopyingExporter:
    def __init__(self, exporter: Any, fault: str | None) -> None:
        self.exporter, self.fault = exporter, fault

    def save(self, exportable: Any, directory: Path) -> None:
        import torch

        if self.fault == "rounding":
            for parameter in exportable.module.parameters():
                parameter.data = parameter.data * 1.5
        self.exporter.save(exportable, directory)
        if self.fault == "pickle":
            torch.save({}, directory / "extra.pt")
        if self.fault == "card":
            (directory / "README.md").unlink()
        if self.fault == "place":
            (directory / "place").write_text(str(directory))

    def load(self, directory: Path, model: Any, compressors: Any) -> Any:
        if self.fault == "place":
            directory = Path((directory / "place").read_text())
        return self.exporter.load(directory, model, compressors)


def test_a_sound_export_passes() -> None:
    check_export(Copying())


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("rounding", "other logits than the module"),
        ("pickle", "save() wrote extra.pt"),
        ("card", "did not write the model"),
    ],
)
def test_an_export_that_breaks_a_promise_is_named(fault: str, told: str) -> None:
    broken(Copying(fault=fault), told, check_export)


def test_an_export_that_needs_the_place_it_was_made_in_fails() -> None:
    with pytest.raises(Exception, match="saved"):
        check_export(Copying(fault="place"))


# ---- strategy


class Lopsided(StrategyConfig):
    """A grid that loses a rank."""

    type: Literal["lopsided"] = "lopsided"

    def layout(self, world_size: int) -> Layout:
        return Layout(data_parallel_size=max(1, world_size - 1))


class Amnesiac(StrategyConfig):
    """The single strategy with a fault in its engine."""

    type: Literal["amnesiac"] = "amnesiac"
    fault: str | None = None
    """Which one."""

    def build(self) -> Any:
        return AmnesiacStrategy(registry().find("strategy", "single")().build(), self.fault)


class AmnesiacStrategy:
    def __init__(self, strategy: Any, fault: str | None) -> None:
        self.strategy, self.fault = strategy, fault

    def engine(self, module: Any, **given: Any) -> Any:
        return AmnesiacEngine(self.strategy.engine(module, **given), self.fault)


class AmnesiacEngine:
    """Passes everything on, but for the fault."""

    def __init__(self, engine: Any, fault: str | None) -> None:
        self.engine, self.fault = engine, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def train_batch(self, microbatches: Any, *, lr: float) -> dict[str, float]:
        if self.fault == "draws":
            microbatches = [replace(microbatch, seed=random.randrange(2**31)) for microbatch in microbatches]
        found: dict[str, float] = self.engine.train_batch(microbatches, lr=0.0 if self.fault == "frozen" else lr)
        if self.fault in ("spoilt", "counted") and not np.isfinite(found["loss"]):
            self.spoil()
        return {"loss": found["loss"]} if self.fault == "metrics" else found

    def spoil(self) -> None:
        """Change a number of one moment, or nothing but how many updates the optimizer believes to have done."""
        kept = {(name, part): np.copy(value) for name, part, value in self.engine.tensors()}
        if self.fault == "spoilt":
            next(value for (_, part), value in kept.items() if part == "exp_avg_sq").flat[0] += 1e-6
        self.engine.load_tensors(lambda name, part: kept[name, part], step=100)

    def eval_batch(self, microbatch: Any, *, logits: bool) -> Any:
        loss, found = self.engine.eval_batch(microbatch, logits=logits)
        return (loss * 2 if self.fault == "evaluation" else loss), found

    def tensors(self) -> Iterator[Any]:
        for name, part, value in self.engine.tensors():
            if not (self.fault == "moments" and part == "exp_avg_sq"):
                yield name, part, value

    def load_tensors(self, read: Any, *, step: int) -> None:
        if self.fault == "weights only":
            self.engine.load_tensors(lambda name, part: read(name, part) * (part == "weight"), step=step)
        else:
            self.engine.load_tensors(read, step=0 if self.fault == "step" else step)


def test_a_grid_of_the_wrong_size_is_named() -> None:
    broken(Lopsided(), "layout(2) makes a grid of 1 ranks", check_strategy)


def test_a_sound_engine_passes() -> None:
    with installed(fake_plugin("broken", Amnesiac)):
        check_engine(Amnesiac())


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("frozen", "does not fall"),
        ("metrics", "must return loss and grad_norm"),
        ("evaluation", "eval_batch says"),
        ("moments", "leaves out moments"),
        ("weights only", "does not give back what tensors() gave"),
        ("step", "the steps after load_tensors() differ"),
        ("spoilt", "must update nothing, it changes"),
        ("counted", "which is left out, differ from others"),
        ("draws", "draws other random numbers the second time"),
    ],
)
def test_an_engine_that_breaks_a_promise_is_named(fault: str, told: str) -> None:
    with installed(fake_plugin("broken", Amnesiac)):
        broken(Amnesiac(fault=fault), told, check_engine)


# ---- fakes


def test_tiny_rows_are_distinct_and_have_both_labels() -> None:
    rows = tiny_rows()
    assert len({row["text"] for row in rows}) == len(rows)
    assert {row["label"] for row in rows} == {"good", "bad"}


def test_sections_of_the_tiny_recipe_can_be_replaced() -> None:
    made = tiny_recipe(name="mine", train={"steps": 3})
    assert (made.name, made.train.steps) == ("mine", 3)


def test_what_is_pretended_to_be_installed_is_gone_afterwards() -> None:
    with installed(fake_plugin("here", Rows)) as found:
        assert found.components["data"]["rows"] is Rows
        assert "ddp" in found.components["strategy"]
    with installed(fake_plugin("here", Rows), besides=False) as found:
        assert list(found.plugins) == ["here"]
    assert "rows" not in registry().components["data"]
