"""Conformance checks and fakes for plugin authors: what a component promises, tried on something tiny.

    from raytx.testing import check_component

    def test_my_model_keeps_the_protocol():
        check_component(MyModel(hidden_size=32))

Each check raises AssertionError with a sentence that names the component and the promise it broke.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pydantic import ValidationError

from raytx.artifact import Golden, replay
from raytx.components import KINDS, Component, Exportable, Model
from raytx.errors import ArtifactError, RaytxError
from raytx.layout import Layout
from raytx.recipe import Recipe, parse
from raytx.registry import Registry, registry
from raytx.tasks.base import IGNORED, Features, Row, Runner, Task

HEAVY = ("torch", "ray", "transformers", "datasets", "deepspeed", "peft", "onnx", "onnxruntime", "tensorflow", "jax")
"""Libraries that a config's module must not import: it is read by `raytx --help`."""
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib")
"""Names under which pickles travel; loading one can run code."""
SIZES = (1, 2, 3, 4, 6, 8, 16)
MAX_LENGTH = 32
STEPS = 10


def check_component(config: Component) -> None:
    """Check what every component promises, then what its kind does."""
    check_config(config)
    {
        "model": check_model,
        "data": check_data,
        "strategy": check_strategy,
        "compression": check_compression,
        "export": check_export,
    }[config.kind](config)


# ---------------------------------------------------------------------------------------------------------- fakes


def tiny_rows(count: int = 24) -> list[Row]:
    """Return distinct rows of text with one of two labels that the text tells."""
    nouns, verbs = ("ray", "head", "node", "worker", "actor", "task"), ("reads", "writes", "sends", "keeps")
    return [
        {
            "text": f"The {nouns[n % 6]} {verbs[n % 4]} {n} blocks, then the {nouns[(n + 2) % 6]} "
            + ("succeeds and all is well." if n % 2 else "fails and nothing is left."),
            "label": "good" if n % 2 else "bad",
        }
        for n in range(count)
    ]


def tiny_model() -> dict[str, Any]:
    """Return a decoder of a few thousand parameters, as a recipe has it."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    width = {"intermediate_size": 64, "max_position_embeddings": 64, "vocab_size": 320}
    return {"type": "decoder", **shape, **width}


def tiny_recipe(**sections: Any) -> Recipe:
    """Return a recipe that trains a few thousand parameters on a few texts in seconds; sections replace its own."""
    sizes = {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "max_length": MAX_LENGTH}
    plain: dict[str, Any] = {
        "name": "tiny",
        "storage_path": str(_scratch() / "runs"),
        "model": tiny_model(),
        "data": {"type": "text-files", "path": str(_scratch() / "texts"), "split": {"test": 0.2}},
        "strategy": {"type": "single"},
        "optim": {"lr": 1e-2, "schedule": "constant"},
        "train": sizes,
    }
    return parse(plain | sections)


@functools.cache
def _scratch() -> Path:
    """Write tiny_rows() as text files into a directory that lives as long as the process."""
    directory = Path(tempfile.mkdtemp(prefix="raytx-testing-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    (directory / "texts").mkdir()
    for place, row in enumerate(tiny_rows()):
        (directory / "texts" / f"{place:03}.txt").write_text(row["text"], encoding="utf-8")
    return directory


class FakeTokenizer:
    """A tokenizer without files: a token for each UTF-8 byte, then end of sequence (256) and padding (257)."""

    eos_token_id = 256
    pad_token_id = 257

    def __len__(self) -> int:
        return 258

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [*text.encode(), *([self.eos_token_id] if add_special_tokens else [])]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")

    def __call__(
        self, text: str, text_pair: str | None = None, *, truncation: bool, max_length: int
    ) -> dict[str, list[int]]:
        ids = self.encode(text) + (self.encode(text_pair) if text_pair else [])
        return {"input_ids": ids[:max_length], "attention_mask": [1] * len(ids[:max_length])}

    def pad(self, samples: Sequence[Features], return_tensors: str) -> dict[str, np.ndarray]:
        width = max(len(sample["input_ids"]) for sample in samples)
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0}
        return {k: np.array([s[k] + [fill] * (width - len(s[k])) for s in samples]) for k, fill in fills.items()}


@dataclass(frozen=True)
class FakeEntryPoint:
    """Stands for an installed plugin: load() returns the module, or raises it where it is an exception."""

    name: str
    module: Any
    version: str = "1.0"

    @property
    def dist(self) -> Any:
        return types.SimpleNamespace(name=self.name.replace("_", "-"), version=self.version)

    def load(self) -> Any:
        if isinstance(self.module, Exception):
            raise self.module
        return self.module


def fake_plugin(name: str, *configs: type[Component], api: int | None = 1, version: str = "1.0") -> FakeEntryPoint:
    """Return an entry point of a plugin that provides components, as if it were installed."""
    from raytx.hookspecs import hookimpl

    module = types.ModuleType(name)
    if api is not None:
        module.RAYTX_API = api  # type: ignore[attr-defined]
    for kind in {config.kind for config in configs}:
        chosen = [config for config in configs if config.kind == kind]
        hook: Callable[[], list[type[Component]]] = lambda chosen=chosen: chosen  # type: ignore[misc]  # noqa: E731
        setattr(module, f"raytx_{kind}", hookimpl(hook))
    return FakeEntryPoint(name, module, version)


@contextlib.contextmanager
def installed(*entry_points: Any, besides: bool = True) -> Iterator[Registry]:
    """Within the context, pretend that plugins are installed, besides the real ones or alone."""
    real = metadata.entry_points

    def pretended(**selection: Any) -> Any:
        found = real(**selection)
        return [*(found if besides else ()), *entry_points] if selection.get("group") == "raytx" else found

    metadata.entry_points = pretended
    registry.cache_clear()
    try:
        yield registry()
    finally:
        metadata.entry_points = real
        registry.cache_clear()


# ------------------------------------------------------------------------------------------------------ all kinds


def _demand(condition: Any, config: Component, sentence: str) -> None:
    if not condition:
        raise AssertionError(f"{config.kind} {config.type!r}: {sentence}")


def check_config(config: Component) -> None:
    """Check the config class: frozen, named, documented, quick to import, and the same after a trip through JSON."""
    _demand(config.kind in KINDS, config, f"kind must be one of {', '.join(KINDS)}")
    _check_type(config)
    _check_documented(config)
    _check_frozen(config)
    again = type(config).model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    _demand(again == config, config, "its dump, read back, is another config; a worker would build something else")
    _demand(isinstance(config.provides, frozenset), config, "provides must be a frozenset of tags")
    _demand(isinstance(config.requires, frozenset), config, "requires must be a frozenset of tags")
    _demand(isinstance(config.conflicts, Mapping), config, "conflicts must be a mapping of tags to reasons")
    _check_light(config)


def _check_type(config: Component) -> None:
    info = type(config).model_fields["type"]
    literal = get_args(info.annotation) == (info.default,)
    _demand(literal, config, 'type must be declared as `type: Literal["name"] = "name"`')


def _check_documented(config: Component) -> None:
    cls = type(config)
    summary = (cls.__dict__.get("__doc__") or "").strip().partition("\n")[0]
    _demand(summary, config, f"class {cls.__name__} has no docstring; its first line is what `raytx plugins` shows")
    own = {name: info for name, info in cls.model_fields.items() if name != "type"}
    bare = [name for name, info in own.items() if not info.description and not _is_section(info.annotation)]
    _demand(not bare, config, f"fields without a description: {', '.join(bare)}; put a docstring below each")


def _is_section(annotation: Any) -> bool:
    """A section describes itself."""
    return isinstance(annotation, type) and bool(annotation.__doc__) and hasattr(annotation, "model_fields")


def _check_frozen(config: Component) -> None:
    settings = type(config).model_config
    _demand(settings.get("extra") == "forbid", config, "unknown keys must be forbidden, as Component does")
    name = "type"
    try:
        setattr(config, name, config.type)
    except (ValidationError, AttributeError, TypeError):
        return
    _demand(False, config, "it must be frozen, as Component is: a plan's values never change")


def _check_light(config: Component) -> None:
    """Import the config's module in a new process and see what came with it."""
    module = type(config).__module__
    code = f"import sys; sys.path[:] = {sys.path!r}; import {module}; print(*(set({HEAVY!r}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    _demand(done.returncode == 0, config, f"module {module} cannot be imported: {done.stderr.strip()[-500:]}")
    came = done.stdout.split()
    _demand(not came, config, f"importing {module} imports {', '.join(sorted(came))}; do that inside build()")


# ----------------------------------------------------------------------------------------------------------- data


def check_data(config: Component) -> None:
    """Check a source of rows: the same rows each time, the same name for them, and splits apart."""
    first, second = config.build(), config.build()
    train, test = _frozen_rows(first, "train"), _frozen_rows(first, "test")
    _demand(train, config, "the train split is empty; check it with a config that has rows")
    same = train == _frozen_rows(first, "train") == _frozen_rows(second, "train")
    _demand(same, config, "the rows come in another order, or differ, the second time; their position names a sample")
    shared = set(train) & set(test)
    _demand(not shared, config, f"{len(shared)} rows are in both splits, for one {next(iter(shared), '')[:80]}")
    prints = {first.fingerprint(), first.fingerprint(), second.fingerprint()}
    _demand(len(prints) == 1 and all(prints), config, "fingerprint() changes although the rows do not")
    remarks = first.remarks()
    _demand(
        isinstance(remarks, list) and all(isinstance(r, str) for r in remarks), config, "remarks() is a list of text"
    )


def _frozen_rows(source: Any, split: Literal["train", "test"]) -> list[str]:
    return [json.dumps(row, sort_keys=True, default=str) for row in source.rows(split)]


# ---------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class _Fitted:
    """A model with its processor and a few encoded samples."""

    model: Model
    task: Task
    directory: Path
    samples: list[Features]

    def module(self, **options: Any) -> Any:
        """Return the module with the weights of seed 0, whatever torch's generator stands at."""
        _torch().seed()
        return self.model.module(self.directory, seed=0, **options).eval()

    def batch(self) -> Features:
        return self.task.collate(self.samples[:4])


@contextlib.contextmanager
def _fitted(config: Component, rows: Sequence[Row] | None = None) -> Iterator[_Fitted]:
    chosen = list(rows or tiny_rows())
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = config.build()
        model.fit(lambda: iter(chosen), directory, max_length=MAX_LENGTH)
        task = model.task(directory)
        rejected: list[str] = []
        samples = list(task.features(chosen, lambda index, reason: rejected.append(f"row {index}: {reason}")))
        _demand(samples, config, f"its task made no sample of {len(chosen)} rows; {'; '.join(rejected[:3])}")
        yield _Fitted(model, task, directory, samples)


def _torch() -> Any:
    """Modules are torch's; the host's source is not."""
    return importlib.import_module("torch")


def check_model(config: Component, rows: Sequence[Row] | None = None) -> None:
    """Check a model and its task on a few rows; give rows where the task needs other columns than text and label."""
    with _fitted(config, rows) as fitted:
        _check_task(config, fitted)
        module = fitted.module()
        _check_size(config, module)
        _check_seed(config, fitted, module)
        runner = fitted.model.runner(module)
        _check_loss(config, fitted, module, runner)
        _check_gradients(config, fitted)
        _check_structure(config, fitted, module)
        _check_neighbours(config, fitted, runner)
        _check_documents(config, fitted, runner)
        if fitted.task.protocol == "openai":
            _check_steps(config, fitted, runner)
        if "save_pretrained" in config.provides:
            _check_saving(config, fitted, module)


def _check_task(config: Any, fitted: _Fitted) -> None:
    promised = config.task_class()
    _demand(isinstance(fitted.task, promised), config, f"task() is no {promised.__name__}, which task_class() promises")
    again = fitted.model.task(fitted.directory)
    _demand(again.state() == fitted.task.state(), config, "task() differs the second time it is read from a directory")
    _demand(
        all("num_targets" in s for s in fitted.samples),
        config,
        "features need num_targets, what the loss averages over",
    )
    _demand(not _pickles(fitted.directory), config, "fit() wrote a pickle, which can run code when it is read")


def _check_size(config: Any, module: Any) -> None:
    """The plan's memory stands on size(): it must be the module's own count, tied parameters once."""
    size = config.size()
    counted = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    _demand(size.layers > 0 and size.hidden_size > 0 and size.vocab_size > 0, config, "size() has a number below one")
    near = abs(size.parameters - counted) <= 0.02 * counted and abs(size.trainable - trained) <= max(0.02 * counted, 0)
    _demand(
        near,
        config,
        f"size() says {size.parameters:,} parameters, {size.trainable:,} trained; "
        f"the module has {counted:,}, {trained:,} trained",
    )


def _check_seed(config: Component, fitted: _Fitted, module: Any) -> None:
    again = dict(fitted.module().named_parameters())
    differ = [name for name, p in module.named_parameters() if not bool((p == again[name]).all())]
    _demand(not differ, config, f"module() gives other weights under the same seed: {', '.join(differ[:3])}")


def _check_structure(config: Component, fitted: _Fitted, module: Any) -> None:
    """Ranks build structures and read parts of the weights, in orders of their own; it must come to the same module."""
    structure = fitted.model.structure(fitted.directory)
    tensors = dict([*structure.named_parameters(), *structure.named_buffers()])
    real = [name for name, tensor in tensors.items() if not tensor.is_meta]
    _demand(not real, config, f"structure() must be on the meta device; {', '.join(real[:3])} take memory")
    whole = dict([*module.named_parameters(), *module.named_buffers()])
    _demand(tensors.keys() == whole.keys(), config, "structure() and module() have parameters of other names")
    weights = fitted.model.weights(fitted.directory, seed=0)
    differ = [n for n in sorted(tensors, reverse=True) if not np.array_equal(weights(n), whole[n].detach().numpy())]
    _demand(not differ, config, f"weights() gives other values than module() has: {', '.join(differ[:3])}")


def _check_loss(config: Component, fitted: _Fitted, module: Any, runner: Runner) -> None:
    batch = fitted.batch()
    logits = runner.logits(batch)
    _demand(logits.dtype == np.float32, config, f"runner.logits gives {logits.dtype}, float32 is promised")
    _demand(
        np.array_equal(logits, runner.logits(batch)), config, "runner.logits differs the second time; is dropout on?"
    )
    if "labels" not in batch:
        return
    loss, expected = _loss(module, batch), _mean_over_targets(logits, np.asarray(batch["labels"]))
    _demand(
        abs(loss - expected) <= 1e-4 * max(1.0, abs(expected)),
        config,
        f"the module's loss is {loss:.6f}, the mean over its targets is {expected:.6f}; "
        "another mean makes the numbers depend on the batch split",
    )


def _loss(module: Any, batch: Features) -> float:
    with _torch().no_grad():
        return float(module(**_tensors(batch)).loss)


def _tensors(batch: Features) -> dict[str, Any]:
    return {key: _torch().from_numpy(np.asarray(value)) for key, value in batch.items()}


def _mean_over_targets(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean cross entropy; logits of sequences predict the token after their own."""
    if logits.ndim == 3:
        logits, labels = logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
    kept = labels != IGNORED
    wide = logits[kept].astype(np.float64)
    top = wide.max(-1, keepdims=True)
    normal = np.log(np.exp(wide - top).sum(-1)) + top[:, 0]
    return float((normal - wide[np.arange(len(wide)), labels[kept]]).mean())


def _check_gradients(config: Component, fitted: _Fitted) -> None:
    """Every trained parameter must get a gradient, the same with recomputed activations."""
    plain, again = _gradients(fitted), _gradients(fitted, activation_checkpointing=True)
    without = [name for name, gradient in plain.items() if gradient is None]
    _demand(not without, config, f"trained parameters without a gradient: {', '.join(without[:5])}")
    differ = [name for name in plain if not np.allclose(plain[name], again[name], rtol=1e-3, atol=1e-5)]
    _demand(not differ, config, f"activation_checkpointing changes the gradient of {', '.join(differ[:3])}")


def _gradients(fitted: _Fitted, **options: Any) -> dict[str, Any]:
    module = fitted.module(**options).train()
    _torch().manual_seed(1)
    module(**_tensors(fitted.batch())).loss.backward()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return {name: None if p.grad is None else p.grad.numpy() for name, p in trained.items()}


def _check_neighbours(config: Component, fitted: _Fitted, runner: Runner) -> None:
    """A sample's logits must not depend on what it is batched with, padding included."""
    samples = sorted(fitted.samples, key=lambda sample: len(sample.get("input_ids", ())))
    chosen = [samples[0], samples[-1]]
    together = runner.logits(fitted.task.collate(chosen))
    for place, sample in enumerate(chosen):
        alone = runner.logits(fitted.task.collate([sample]))[0]
        beside = together[place, : len(alone)] if together.ndim == 3 else together[place]
        gap = float(np.abs(alone - beside).max())
        _demand(
            gap <= 1e-4, config, f"a sample's logits change by {gap:.1e} with what it is batched with; is padding seen?"
        )


def _check_documents(config: Component, fitted: _Fitted, runner: Runner) -> None:
    """A packed document's logits must be those it has alone."""
    if "position_ids" not in fitted.batch():
        return
    packed = next((s for s in fitted.samples if list(s["position_ids"]).count(0) > 1), None)
    _demand(packed is not None, config, "its task packs, but put no two of the rows into one sample; give shorter rows")
    assert packed is not None
    start = list(packed["position_ids"]).index(0, 1)
    end = len(packed["input_ids"])
    end = next((n for n in range(start + 1, end) if packed["position_ids"][n] == 0), end)
    second = {key: packed[key][start:end] for key in ("input_ids", "labels", "position_ids")}
    alone = runner.logits(fitted.task.collate([second | {"num_targets": end - start - 1}]))[0]
    gap = float(np.abs(runner.logits(fitted.task.collate([packed]))[0, start:end] - alone).max())
    _demand(
        gap <= 1e-4,
        config,
        f"a packed document sees the one before it (its logits change by {gap:.1e}); refuse packing",
    )


def _check_steps(config: Component, fitted: _Fitted, runner: Runner) -> None:
    """Reading a prompt and then token by token must give what reading all at once gives."""
    tokens = max((list(sample["input_ids"]) for sample in fitted.samples), key=len)
    prompts = [tokens[:3], tokens[:6]]
    cache, logits = runner.prefill(prompts)
    for length in range(3):
        whole = [_whole(runner, prompt + tokens[7 : 7 + length]) for prompt in prompts]
        gap = float(np.abs(logits - np.stack(whole)).max())
        _demand(gap <= 1e-3, config, f"after {length} single steps the logits are {gap:.1e} off reading all at once")
        cache, logits = runner.step(cache, np.array([tokens[7 + length]] * 2, dtype=np.int64))


def _whole(runner: Runner, tokens: list[int]) -> np.ndarray:
    ids = np.array([tokens], dtype=np.int64)
    last: np.ndarray = runner.logits({"input_ids": ids, "attention_mask": np.ones_like(ids)})[0, -1]
    return last


def _check_saving(config: Component, fitted: _Fitted, module: Any) -> None:
    """What save_pretrained writes must load to the same model, and the skeleton must fit its weights."""
    merged = fitted.model.merged(module)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "saved"
        shutil.copytree(fitted.directory, directory)
        merged.save_pretrained(directory)
        _demand(not _pickles(directory), config, "save_pretrained wrote a pickle; safetensors can run no code")
        batch = _plain(fitted.batch())
        gap = _gap(fitted.model.runner(fitted.model.load(directory).eval()), fitted.model.runner(merged), batch)
        _demand(gap <= 1e-6, config, f"load() gives logits {gap:.1e} off those of the module that was saved")
        skeleton = set(fitted.model.skeleton(directory).state_dict())
        _demand(skeleton == set(merged.state_dict()), config, "skeleton() has other parameters than the merged module")


def _plain(batch: Features) -> Features:
    return {key: value for key, value in batch.items() if key != "labels"}


def _gap(one: Runner, other: Runner, batch: Features) -> float:
    return float(np.abs(one.logits(batch) - other.logits(batch)).max())


# ------------------------------------------------------------------------------------ compression and export


def check_compression(config: Component, model: Component | None = None) -> None:
    """Check that a compressed model's state fits the structure that restore() gives, and gives the same logits."""
    with _fitted(model or _tiny_component()) as fitted:
        compressor = config.build()
        prepared = compressor.prepare(fitted.module())
        _demand(prepared is not None, config, "prepare() returned nothing; return the module, changed or not")
        converted = compressor.convert(fitted.model.merged(prepared))
        _demand(converted is not None, config, "convert() returned nothing; return the module, changed or not")
        state = {name: value for name, value in converted.state_dict().items()}
        again = fitted.module()
        for parameter in again.parameters():
            parameter.data.zero_()
        restored = compressor.restore(fitted.model.merged(again))
        _demand(restored is not None, config, "restore() returned nothing; return the module, changed or not")
        restored.load_state_dict(state)
        batch = _plain(fitted.batch())
        one, other = fitted.model.runner(converted.eval()), fitted.model.runner(restored.eval())
        _demand(np.isfinite(one.logits(batch)).all(), config, "the converted model's logits are not finite")
        gap = _gap(one, other, batch)
        _demand(gap <= 1e-6, config, f"restore() and the saved state give logits {gap:.1e} off the converted model's")


def check_export(config: Component, model: Component | None = None, compression: Sequence[Component] = ()) -> None:
    """Check that a saved form, moved elsewhere, gives the module's logits and holds nothing that can run code."""
    chosen = model or _tiny_component()
    missing = config.requires - chosen.provides
    _demand(not missing, config, f"needs {', '.join(missing)}, which model {chosen.type!r} lacks; give another model")
    with _fitted(chosen) as fitted, tempfile.TemporaryDirectory() as name:
        compressors = [step.build() for step in compression]
        module = fitted.model.merged(fitted.module())
        for compressor in compressors:
            module = compressor.convert(module)
        features = fitted.task.golden(fitted.samples[:4])
        live = fitted.model.runner(module.eval())
        golden = live.logits(features)
        saved, moved = Path(name) / "saved", Path(name) / "moved"
        saved.mkdir()
        exportable = Exportable(fitted.model, module, fitted.task, features, "# A card\n", compressors)
        config.build().save(exportable, saved)
        saved.rename(moved)
        _check_saved(config, fitted, moved)
        _check_replay(config, Golden(features, golden), config.build().load(moved, fitted.model, compressors))
        _demand(np.array_equal(live.logits(features), golden), config, "save() changed the live module")


def _check_saved(config: Component, fitted: _Fitted, directory: Path) -> None:
    _demand(any(directory.iterdir()), config, "save() wrote nothing")
    found = _pickles(directory)
    _demand(not found, config, f"save() wrote {', '.join(found)}: a pickle can run code when it is read")
    _demand((directory / "README.md").is_file(), config, "save() did not write the model card, README.md")
    state = fitted.model.task(directory).state()
    _demand(state == fitted.task.state(), config, "the directory's processor is not the one the model was trained with")


def _check_replay(config: Any, golden: Golden, runner: Runner) -> None:
    """Hold the loaded form to the live module's logits, as a real export does."""
    try:
        replay(golden, runner, config, Path("loaded"))
    except ArtifactError as error:
        _demand(False, config, f"save() and load() give other logits than the module: {error}")


def _pickles(directory: Path) -> list[str]:
    """Return files that are pickles by name or by their first bytes (protocol 2 and later)."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return [path.name for path in files if path.suffix in PICKLES or _starts_as_pickle(path)]


def _starts_as_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(3)
    return len(head) == 3 and head[0] == 0x80 and head[1] in (2, 3, 4, 5) and head[2:] in b"c}](X\x95K\x8c"


def _tiny_component() -> Component:
    return registry().parse("model", tiny_model())


# ------------------------------------------------------------------------------------------------------- strategy


def check_strategy(config: Component) -> None:
    """Check a strategy's arithmetic, then its engine on one process, in a process of its own.

    A strategy that does not run on one worker is checked for its arithmetic only.
    """
    layouts = _check_layouts(config)
    _check_environment(config)
    if 1 in layouts:
        _check_in_own_process(config)


def _check_layouts(config: Any) -> dict[int, Layout]:
    layouts = {}
    for size in SIZES:
        with contextlib.suppress(RaytxError):
            layouts[size] = config.layout(size)
    _demand(layouts, config, f"layout() refuses each of {SIZES} workers")
    for size, layout in layouts.items():
        _demand(layout.world_size == size, config, f"layout({size}) makes a grid of {layout.world_size} ranks")
        shares = config.shares(layout)
        parts = (shares.parameters, shares.gradients, shares.optimizer, shares.activations)
        fine = all(isinstance(part, int) and 1 <= part <= size for part in parts)
        _demand(fine, config, f"shares() of {size} ranks are {parts}; each is a whole number from 1 to {size}")
    return layouts


def _check_environment(config: Any) -> None:
    values = config.environment(use_gpu=False)
    fine = all(isinstance(key, str) and isinstance(value, str) for key, value in values.items())
    _demand(fine, config, "environment() must map text to text")


def _check_in_own_process(config: Any) -> None:
    """Its environment must be set before torch is imported, and a process can be member of one group only."""
    cls = type(config)
    given = json.dumps({"module": cls.__module__, "name": cls.__qualname__, "config": config.model_dump(mode="json")})
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from raytx import testing; testing.check_engine_of(sys.stdin.read())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=given,
        env=os.environ | rank | config.environment(use_gpu=False),
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        # torch writes a traceback's lines behind "[rank0]: " where there is a group
        told = [
            line.partition("AssertionError: ")[2] for line in done.stderr.splitlines() if "AssertionError: " in line
        ]
        raise AssertionError(told[-1] if told else f"{config.kind} {config.type!r}: {done.stderr[-4000:]}")


def check_engine_of(given: str) -> None:
    """Rebuild a strategy from the JSON that check_strategy sends, and check its engine."""
    data = json.loads(given)
    cls = functools.reduce(getattr, data["name"].split("."), importlib.import_module(data["module"]))
    with tempfile.TemporaryDirectory() as directory, _group(Path(directory)):
        check_engine(cls.model_validate(data["config"]))


@contextlib.contextmanager
def _group(directory: Path) -> Iterator[None]:
    """Make this process a group of one rank, as Ray Train makes groups of workers."""
    distributed = importlib.import_module("torch.distributed")
    distributed.init_process_group("gloo", init_method=f"file://{directory / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@dataclass
class _Bench:
    """An engine of one rank with batches to feed it."""

    engine: Any
    batches: Any
    lr: float
    step: int = 0
    kept: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    def train(self, steps: int) -> list[dict[str, float]]:
        found = [self.engine.train_batch(self.batches.microbatches(n), lr=self.lr) for n in self._next(steps)]
        return [{key: float(value) for key, value in metrics.items()} for metrics in found]

    def _next(self, steps: int) -> Iterable[int]:
        first, self.step = self.step, self.step + steps
        return range(first, self.step)

    def state(self) -> dict[tuple[str, str], np.ndarray]:
        """Return every tensor, copied; an engine of one rank holds them all."""
        return {(name, part): np.array(value) for name, part, value in self.engine.tensors() if value is not None}


def check_engine(config: Any) -> None:
    """Check a strategy's engine in this process, which is a group of one rank."""
    bench = _bench(config)
    _check_training(config, bench)
    _check_evaluation(config, bench)
    _check_state(config, bench)
    _check_left_out(config, bench)
    _check_draws(config, bench)
    _demand(bench.engine.gather("x") == ["x"], config, "gather() of one rank must return a list of its own value")
    bench.engine.barrier()
    _demand(bench.engine.peak_memory() > 0, config, "peak_memory() must be the bytes that were used at most")


def _bench(config: Any) -> _Bench:
    from rich.console import Console

    from raytx.batches import Batches
    from raytx.plan import resolve
    from raytx.prepare import prepare

    plan, prepared = prepare(resolve(tiny_recipe(strategy=config)), Console(quiet=True))
    model, strategy = plan.recipe.model.build(), config.build()
    module = model.structure(prepared.processor)
    weights = model.weights(prepared.processor)
    engine = strategy.engine(module, model=model, weights=weights, plan=plan, rank=0)
    batches = Batches(plan, model.task(prepared.processor), prepared.samples("train"), dp_rank=0)
    return _Bench(engine, batches, lr=plan.recipe.optim.lr)


def _check_training(config: Any, bench: _Bench) -> None:
    fixed = bench.batches.microbatches(0)[0]
    before, _ = bench.engine.eval_batch(fixed, logits=False)
    metrics = bench.train(STEPS)
    after, _ = bench.engine.eval_batch(fixed, logits=False)
    _demand(
        all({"loss", "grad_norm"} <= m.keys() for m in metrics), config, "train_batch must return loss and grad_norm"
    )
    losses = [m["loss"] for m in metrics]
    _demand(np.isfinite(losses).all(), config, f"train_batch gives losses that are not finite: {losses}")
    _demand(all(m["grad_norm"] > 0 for m in metrics), config, "train_batch gives a gradient norm of 0: is it measured?")
    fell = f"{before:.4f} before, {after:.4f} after {STEPS} steps"
    _demand(after < before, config, f"the loss of a batch that was trained on does not fall: {fell}")


def _check_left_out(config: Any, bench: _Bench) -> None:
    """A step whose numbers are not finite must be as if it had not been, for the steps after it too."""
    kept, step = bench.state(), bench.step
    poisoned, *rest = bench.batches.microbatches(step)
    metrics = bench.engine.train_batch([replace(poisoned, weight=float("nan")), *rest], lr=bench.lr)
    found = f"loss {metrics['loss']}, grad_norm {metrics['grad_norm']}"
    _demand(not np.isfinite(metrics["loss"]), config, f"a loss that is nan must be returned as such, not as {found}")
    changed = _changes(kept, bench.state())
    _demand(not changed, config, f"a step with {found} must update nothing, it changes {', '.join(changed[:3])}")
    first = bench.train(2)
    bench.engine.load_tensors(lambda name, part: kept[name, part], step=step)
    bench.step = step
    _demand(bench.train(2) == first, config, f"the steps after one with {found}, which is left out, differ from others")


def _check_draws(config: Any, bench: _Bench) -> None:
    """What a model draws while it is trained or evaluated must follow from the microbatch's seed alone."""
    microbatches = bench.batches.microbatches(0)  # made beforehand: collating seeds too
    passes: dict[str, Callable[[], Any]] = {
        "train_batch": lambda: bench.engine.train_batch(microbatches, lr=0.0),
        "eval_batch": lambda: bench.engine.eval_batch(microbatches[0], logits=False),
    }
    for name, run in passes.items():
        one, other = _drawn(bench.engine, run), _drawn(bench.engine, run)
        told = "draws other random numbers the second time; seed_generators(microbatch.seed) belongs before each pass"
        _demand(one and one == other, config, f"a model under {name} {told}")


def _drawn(engine: Any, run: Callable[[], Any]) -> list[tuple[float, ...]]:
    """Return what each module of a model draws in a pass, from every generator, after these were put anywhere."""
    torch = _torch()
    drawn: list[tuple[float, ...]] = []
    random.seed()
    np.random.seed()
    torch.seed()

    def draw(*given: Any) -> None:
        drawn.append((random.random(), float(np.random.random()), float(torch.rand(()))))

    hooks = [module.register_forward_pre_hook(draw) for module in engine.module.modules()]
    run()
    for hook in hooks:
        hook.remove()
    return drawn


def _changes(before: Mapping[tuple[str, str], np.ndarray], after: Mapping[tuple[str, str], np.ndarray]) -> list[str]:
    return [
        f"{name} ({part})" for (name, part), array in after.items() if not np.array_equal(array, before[name, part])
    ]


def _check_evaluation(config: Any, bench: _Bench) -> None:
    microbatch = bench.batches.microbatches(0)[0]
    loss, logits = bench.engine.eval_batch(microbatch, logits=True)
    _demand(
        logits is not None and logits.dtype == np.float32, config, "eval_batch(logits=True) must give float32 logits"
    )
    expected = _mean_over_targets(logits, microbatch.features["labels"])
    near = abs(loss - expected) <= 1e-4 * max(1.0, expected)
    _demand(near, config, f"eval_batch says {loss:.6f}, the mean over the targets of its logits is {expected:.6f}")
    _demand(
        bench.engine.eval_batch(microbatch, logits=False)[1] is None, config, "eval_batch(logits=False) gives logits"
    )
    again, _ = bench.engine.eval_batch(microbatch, logits=False)
    _demand(again == loss, config, "eval_batch differs the second time: it must not train, and dropout must be off")


def _check_state(config: Any, bench: _Bench) -> None:
    """What is taken out, put back after more steps, must continue to the same numbers."""
    kept, step = bench.state(), bench.step
    names = {name for name, part in kept if part == "weight"}
    moments = {name for name, part in kept if part == "exp_avg"} & {name for name, part in kept if part == "exp_avg_sq"}
    trained = {name for name, parameter in bench.engine.module.named_parameters() if parameter.requires_grad}
    _demand(trained <= names, config, f"tensors() leaves out the weights {sorted(trained - names)[:3]}")
    _demand(trained <= moments, config, f"tensors() leaves out moments of {sorted(trained - moments)[:3]}")
    wrong = [name for (name, _), value in kept.items() if value.dtype != np.float32 and value.dtype.kind == "f"]
    _demand(not wrong, config, f"tensors() must be float32, {', '.join(wrong[:3])} are not")
    first = bench.train(2)
    bench.engine.load_tensors(lambda name, part: kept[name, part], step=step)
    bench.step = step
    changed = _changes(kept, bench.state())
    _demand(not changed, config, f"load_tensors() does not give back what tensors() gave: {', '.join(changed[:3])}")
    _demand(
        bench.train(2) == first, config, "the steps after load_tensors() differ from those that were not interrupted"
    )


__all__ = [
    "FakeEntryPoint",
    "FakeTokenizer",
    "check_component",
    "check_compression",
    "check_config",
    "check_data",
    "check_engine",
    "check_export",
    "check_model",
    "check_strategy",
    "fake_plugin",
    "installed",
    "tiny_model",
    "tiny_recipe",
    "tiny_rows",
]
