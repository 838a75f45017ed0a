"""Rows to features, once, on CPU, into a content-addressed cache that workers map into memory."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.status import Status

from raytx import __version__, storage
from raytx.components import Model, Source
from raytx.errors import DataError
from raytx.files import digest, disagreements, inventory, read_json, write_json
from raytx.plan import CACHE, Plan
from raytx.registry import registry
from raytx.storage import Store
from raytx.tasks.base import TASK_FILE, Features, Row, Task

META = "prepared.json"
MANIFEST = "manifest.json"
"""Size and hash of every other file of prepared data."""
BATCH = 1000
REJECTED_SHOWN = 20

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass(frozen=True)
class Prepared:
    """A prepared cache directory: processor/, train.arrow, test.arrow and what was found on the way."""

    directory: Path
    num_samples: dict[str, int]
    num_targets: dict[str, int]
    remarks: list[str]
    baseline: dict[str, Any]
    """What a model that learned only frequencies would score on the training samples: {"name", metric: value}."""

    @property
    def processor(self) -> Path:
        return self.directory / "processor"

    def samples(self, split: Split) -> Samples:
        return Samples.open(self.directory / f"{split}.arrow")


class Samples:
    """The samples of one split, mapped into memory, addressed by index."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self.num_targets: np.ndarray = table["num_targets"].to_numpy()
        lengths = [c for c in table.column_names if pa.types.is_list(table[c].type)]
        self.lengths: np.ndarray = (
            pc.list_value_length(table[lengths[0]]).to_numpy() if lengths else np.ones(len(table), dtype=np.int64)
        )
        """Tokens of each sample; 1 for samples that are no sequences."""

    @classmethod
    def open(cls, path: Path) -> Samples:
        return cls(pa.ipc.open_file(pa.memory_map(str(path))).read_all())

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> list[Features]:
        rows: list[Features] = self._table.take(pa.array(indices, type=pa.int64())).to_pylist()
        return rows


def prepare(plan: Plan, console: Console) -> tuple[Plan, Prepared]:
    """Find or make the prepared data of a plan; return the plan with steps settled, and the data."""
    source: Source = plan.recipe.data.build()
    key = digest(
        {
            "version": __version__,
            "plugins": _makers(plan),
            "source": source.fingerprint(),
            "model": plan.recipe.model.model_dump(mode="json"),
            "model_files": plan.recipe.model.build().fingerprint(),
            "max_length": plan.recipe.train.max_length,
        }
    )
    directory = plan.run_dir.parent / CACHE / key
    store = storage.of(plan.recipe.storage_path)
    if not (directory / META).is_file() and not (store and _fetch(store, directory)):
        _make(plan, source, directory, console)
    if store and not _is_there(store, directory):
        with console.status(f"copying prepared data to {store.uri}"):
            store.put_directory(directory, f"{CACHE}/{key}", last=META)
    prepared = Prepared(directory=directory, **read_json(directory / META))
    _check_held_out(plan, prepared.num_samples["test"])
    num_samples = prepared.num_samples["train"]
    return plan.with_data(directory=directory, num_samples=num_samples, content=_content(directory)), prepared


def _content(directory: Path) -> str:
    """Return a name for what is learned from: samples, labels and tokenizer, not who prepared them."""
    files = read_json(directory / MANIFEST)["files"]
    learned = ("train.arrow", "test.arrow", f"processor/{TASK_FILE}", "processor/tokenizer.json")
    return digest({name: files[name]["sha256"] for name in learned if name in files})


def bring(plan: Plan) -> None:
    """Fetch a plan's prepared data to this node, where it is a store that nodes share and this one lacks it."""
    store, directory = storage.of(plan.recipe.storage_path), plan.data_dir
    if store is None or (directory / META).is_file():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.with_name(f".{directory.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process of a node fetches, the others wait for it
        if not (directory / META).is_file() and not _fetch(store, directory):
            raise DataError(
                f"prepared data {directory.name} is not whole in {store.uri}/{CACHE}. Remove it there and run the same "
                "command again: it is prepared anew"
            )


def _is_there(store: Store, directory: Path) -> bool:
    return META in storage.persistently(lambda: store.sizes(f"{CACHE}/{directory.name}"))


def _fetch(store: Store, directory: Path) -> bool:
    """Fetch prepared data; return whether it is there and whole. What is not is removed there, to be made anew."""
    name, staging = f"{CACHE}/{directory.name}", directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        if not store.get_directory(name, staging, last=META):
            return False
        if not _is_whole(staging):
            store.remove_directory(name)
            return False
        with contextlib.suppress(OSError):  # another process was faster
            staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return (directory / META).is_file()


def _is_whole(directory: Path) -> bool:
    try:
        return not disagreements(directory, read_json(directory / MANIFEST)["files"], manifest=MANIFEST)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _makers(plan: Plan) -> dict[str, str]:
    """Return the plugins that decide what is prepared. Strategy and export are no part of it, nor may they ever be."""
    components = (plan.recipe.model, plan.recipe.data)
    names = {registry().owner(component).name for component in components}
    names |= {name for component in components for name in getattr(component, "plugins", ())}
    return {name: plan.plugins[name] for name in sorted(names)}


def _check_held_out(plan: Plan, num_test: int) -> None:
    """Refuse keys that need a held-out split where there is none: nothing could obey them."""
    recipe = plan.recipe
    wanted = {
        "evaluate.every": recipe.evaluate.every is not None,
        "evaluate.metric": recipe.evaluate.metric is not None,
        "save.keep=best": recipe.save.keep == "best",
        "compression.max_metric_loss": any(step.max_metric_loss is not None for step in recipe.compression),
    }
    if not num_test and (named := [key for key, is_set in wanted.items() if is_set]):
        raise DataError(
            f"{', '.join(named)}: needs held-out samples, and the data has none. Hold some out (data.split, more "
            "data), or leave these keys out"
        )


def _make(plan: Plan, source: Source, directory: Path, console: Console) -> None:
    """Encode both splits into a staging directory and put it in place whole."""
    staging = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "processor").mkdir(parents=True)
    try:
        model: Model = plan.recipe.model.build()
        next(_checked(source, plan), None)  # a processor that learns nothing would never look at the rows
        with console.status("preparing data: reading rows and fitting the processor"):
            model.fit(lambda: _checked(source, plan), staging / "processor", max_length=plan.recipe.train.max_length)
        task = model.task(staging / "processor")
        meta = _encode(task, source, staging, console)
        write_json(staging / META, meta)
        write_json(staging / MANIFEST, {"files": inventory(staging)})
        if not (directory / META).is_file():  # another process may have been first; its result is the same
            shutil.rmtree(directory, ignore_errors=True)
            staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _checked(source: Source, plan: Plan) -> Iterator[Row]:
    """Yield training rows; raise DataError at the first that lacks a column the task needs."""
    needed = plan.recipe.model.task_class().required_columns
    for row in source.rows("train"):
        if missing := [column for column in needed if column not in row]:
            raise DataError(
                f"data {plan.recipe.data.type!r}: rows have {', '.join(map(repr, row)) or 'no columns'}, task "
                f"{plan.recipe.model.task_class().name!r} needs {', '.join(map(repr, missing))}. Map it: "
                f"data.columns={{{missing[0]}: <column>}}"
            )
        yield row


def _encode(task: Task, source: Source, staging: Path, console: Console) -> dict[str, Any]:
    """Encode both splits; return what prepared.json says of them."""
    num_samples, num_targets, remarks = {}, {}, []
    for split in SPLITS:
        rejected: list[tuple[int, str]] = []
        with console.status(f"preparing data: encoding the {split} split") as status:
            features = _features(task, source.rows(split), rejected, _Counter(status, split))
            num_samples[split], num_targets[split] = _write(features, staging / f"{split}.arrow")
        if rejected:
            remarks.append(_rejections(split, rejected))
    if not num_samples["train"]:
        raise DataError(f"the training split has no usable rows. {' '.join(remarks) or 'The source is empty.'}")
    name, values = task.baseline(_every(Samples.open(staging / "train.arrow")))
    return {
        "num_samples": num_samples,
        "num_targets": num_targets,
        "remarks": source.remarks() + remarks,
        "baseline": {"name": name, **values},
    }


def _features(
    task: Task, rows: Iterator[Row], rejected: list[tuple[int, str]], count: Callable[[Iterator[Row]], Iterator[Row]]
) -> Iterator[Features]:
    """Encode rows; leave out samples without a target, whose mean loss is 0/0 and which teach nothing."""
    for place, sample in enumerate(task.features(count(rows), lambda index, why: rejected.append((index, why)))):
        if sample["num_targets"]:
            yield sample
        else:
            rejected.append((place, "no target"))


@dataclass(frozen=True)
class _Counter:
    """Passes rows through and shows how many."""

    status: Status
    split: Split

    def __call__(self, rows: Iterator[Row]) -> Iterator[Row]:
        for count, row in enumerate(rows):
            if count % BATCH == 0:
                self.status.update(f"preparing data: encoding the {self.split} split, row {count:,}")
            yield row


def _every(samples: Samples) -> Iterator[Features]:
    for start in range(0, len(samples), BATCH):
        yield from samples[range(start, min(start + BATCH, len(samples)))]


def _rejections(split: str, rejected: list[tuple[int, str]]) -> str:
    reasons = ", ".join(f"{count} x {reason}" for reason, count in Counter(r for _, r in rejected).most_common(5))
    shown = ", ".join(str(index) for index, _ in rejected[:REJECTED_SHOWN])
    more = " ..." if len(rejected) > REJECTED_SHOWN else ""
    rows = "row" if len(rejected) == 1 else "rows"
    return f"{len(rejected)} {rows} of the {split} split left out ({reasons}): {rows} {shown}{more}"


def _write(features: Iterator[Features], path: Path) -> tuple[int, int]:
    """Write encoded samples as an Arrow file; return how many, and how many targets they have."""
    samples = targets = 0
    first = next(features, None)
    schema = _schema(first if first is not None else {"num_targets": 0})
    with pa.ipc.new_file(str(path), schema) as writer:
        for held in _groups(itertools.chain([] if first is None else [first], features)):
            writer.write_table(pa.Table.from_pylist(held, schema=schema))
            samples, targets = samples + len(held), targets + sum(sample["num_targets"] for sample in held)
    return samples, targets


def _groups(features: Iterator[Features]) -> Iterator[list[Features]]:
    while held := list(itertools.islice(features, BATCH)):
        yield held


def _schema(sample: Features) -> pa.Schema:
    """Return the Arrow schema of encoded samples; token ids fit 32 bits."""
    return pa.schema([(key, _type(value)) for key, value in sample.items()])


def _type(value: Any) -> pa.DataType:
    if isinstance(value, list | tuple | np.ndarray):
        return pa.list_(pa.int32() if not len(value) or isinstance(value[0], int | np.integer) else pa.float32())
    return pa.float64() if isinstance(value, float) else pa.int64()
