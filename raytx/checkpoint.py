"""Committed checkpoints: one format for every strategy, complete or absent.

    checkpoints/step-00000200/
        weights-00000-00000.safetensors      fp32, keyed by Hugging Face parameter name; <rank>-<shard>
        optimizer-00000-00000.safetensors    keyed "<name>|exp_avg" and "<name>|exp_avg_sq"
        golden.safetensors                   a few held-out samples and the logits the trained engine gave them
        processor/  demo.json                tokenizer and labels; requests made of held-out samples
        plan.json  state.json                what was trained, and how far
        manifest.json                        every file's size and SHA-256, written last

A directory is written under another name and renamed when its manifest is on disk, so a run that is killed at any
moment leaves complete checkpoints and rubbish that is known to be rubbish. Nothing in it is pickled.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from raytx.artifact import GOLDEN, Golden
from raytx.components import Engine, Part
from raytx.errors import CheckpointError, TrainingError
from raytx.files import disagreements, inventory, open_to_readers, read_json, sync_directory, walk, write_json
from raytx.plan import Plan
from raytx.tasks.base import Request

MANIFEST = "manifest.json"
FORMAT = 2
SHARD_BYTES = 1 << 30
"""A rank starts a new file when the tensors it holds reach this size, which bounds its extra memory."""


@dataclass(frozen=True)
class State:
    """How far a run is. Data position and dropout follow from the step; see batches.py."""

    step: int = 0
    """Optimizer updates done."""
    best: float | None = None
    """Best value of the metric so far."""
    best_step: int | None = None
    metric: str | None = None
    """Which metric and mode best is of; another recipe may ask for another."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The evaluation of this very step; empty when there was none."""
    seconds: float = 0.0
    """Wall-clock seconds spent in training, over all attempts."""
    scalars: dict[str, float] = field(default_factory=dict)
    """The engine's own numbers, such as the loss scale of fp16."""


class Checkpoint:
    """A committed directory, read tensor by tensor."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest: dict[str, Any] = read_json(directory / MANIFEST)
        self.state = State(**read_json(directory / "state.json"))
        self._files = [name for name in self.manifest["files"] if name.startswith(("weights-", "optimizer-"))]
        self._places: dict[str, Any] = {}

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def plan(self) -> dict[str, Any]:
        plan: dict[str, Any] = read_json(self.directory / "plan.json")
        return plan

    @property
    def processor(self) -> Path:
        return self.directory / "processor"

    @property
    def demo(self) -> Demo:
        return [(request, shown) for request, shown in read_json(self.directory / "demo.json")]

    @property
    def golden(self) -> Golden:
        return Golden.load(self.directory / GOLDEN)

    def read(self, name: str, part: Part) -> np.ndarray:
        """Return one whole tensor; raise CheckpointError when the checkpoint has none of that name."""
        key = _key(name, part)
        if not self._places:
            self._open()
        if key not in self._places:
            raise CheckpointError(f"{self.directory}: holds no {part} of {name!r}; was it saved from another model?")
        array: np.ndarray = self._places[key].get_tensor(key)
        return array

    def weights(self) -> Mapping[str, np.ndarray]:
        """Return the trained weights by Hugging Face parameter name, each read when it is asked for."""
        if not self._places:
            self._open()
        return _Weights(self, [key for key in self._places if "|" not in key])

    def _open(self) -> None:
        for name in self._files:
            file: Any = safe_open(self.directory / name, framework="numpy")
            self._places |= dict.fromkeys(file.keys(), file)


class _Weights(Mapping[str, np.ndarray]):
    def __init__(self, checkpoint: Checkpoint, names: list[str]) -> None:
        self._checkpoint, self._names = checkpoint, names

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._checkpoint.read(name, "weight")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


Demo = list[tuple[Request, str]]


def commit(engine: Engine, run_dir: Path, *, rank: int, plan: Plan, state: State, golden: Golden, demo: Demo) -> Path:
    """Write a checkpoint, all ranks together; it exists when this returns. Collective.

    Raises TrainingError on every rank when any of them cannot write (disk full, read-only storage); what is half
    written is removed and earlier checkpoints stay.
    """
    target = run_dir / "checkpoints" / _name(state.step)
    staging = target.with_name(f".{target.name}.staging")
    _agree(engine, target, _attempt(lambda: _stage(staging)) if rank == 0 else None)
    _agree(engine, target, _write_tensors(engine, staging, rank))
    _agree(engine, target, _attempt(lambda: _seal(staging, target, plan, state, golden, demo)) if rank == 0 else None)
    return target


def _agree(engine: Engine, target: Path, error: str | None) -> None:
    """Let every rank know whether any of them failed, so that none waits for another that has given up."""
    failures = [f"rank {rank}: {text}" for rank, text in enumerate(engine.gather(error)) if text]
    if failures:
        shutil.rmtree(target.with_name(f".{target.name}.staging"), ignore_errors=True)
        raise TrainingError(
            f"could not save {target}: {'; '.join(failures)}. Free or repair the storage and run the same command "
            "again: it goes on from the last complete checkpoint"
        )


def _attempt(action: Callable[[], None]) -> str | None:
    """Do it and return None, or return what went wrong in words."""
    try:
        action()
    except OSError as error:
        return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    except Exception as error:  # safetensors raises its own type for a full disk
        return f"{type(error).__name__}: {error}"
    return None


def _stage(staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)


def _write_tensors(engine: Engine, staging: Path, rank: int) -> str | None:
    """Write the tensors that this rank was handed, in files of bounded size; return why it could not, or None.

    The engine's iteration is collective, so it goes on to its end after an error in writing.
    """
    writers = {"weights": _Shards(staging, "weights", rank), "optimizer": _Shards(staging, "optimizer", rank)}
    error: str | None = None
    for name, part, array in engine.tensors():
        if array is not None and error is None:
            writer = writers["weights" if part == "weight" else "optimizer"]
            error = _attempt(lambda: writer.add(_key(name, part), array))  # noqa: B023  called at once
    for writer in writers.values():
        error = error or _attempt(writer.flush)
    return error


class _Shards:
    def __init__(self, directory: Path, stem: str, rank: int) -> None:
        self._directory, self._stem, self._rank = directory, stem, rank
        self._held: dict[str, np.ndarray] = {}
        self._bytes = self._count = 0

    def add(self, key: str, array: np.ndarray) -> None:
        if not array.size:
            raise ValueError(f"{key} is empty")
        self._held[key] = np.array(array, order="C", copy=True)  # the engine may go on to change its own
        self._bytes += array.nbytes
        if self._bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self._held:
            return
        path = self._directory / f"{self._stem}-{self._rank:05d}-{self._count:05d}.safetensors"
        save_file(self._held, path, metadata={"format": "pt"})
        _sync(path)
        self._held, self._bytes, self._count = {}, 0, self._count + 1


def _seal(staging: Path, target: Path, plan: Plan, state: State, golden: Golden, demo: Demo) -> None:
    assert plan.prepared is not None
    golden.save(staging / GOLDEN)
    shutil.copytree(Path(plan.prepared) / "processor", staging / "processor")
    write_json(staging / "demo.json", demo)
    write_json(staging / "plan.json", plan.to_dict())
    write_json(staging / "state.json", asdict(state))
    open_to_readers(staging)
    for path in walk(staging):
        _sync(path)
    write_json(staging / MANIFEST, {"format": FORMAT, "step": state.step, "files": inventory(staging)})
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
    sync_directory(target.parent)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _key(name: str, part: Part) -> str:
    return name if part == "weight" else f"{name}|{part}"


def complete(run_dir: Path) -> list[Path]:
    """Return the checkpoint directories of a run that have a manifest, newest first. Their hashes are not checked."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted((path for path in found if (path / MANIFEST).is_file()), reverse=True)


def newest(run_dir: Path, *, tell: Callable[[str], None] | None = None, set_aside: bool = False) -> Checkpoint | None:
    """Return the newest checkpoint whose every file is as its manifest says, or None; say which were passed over.

    Where it is asked for, damaged ones are renamed, so that nothing counts them as checkpoints again.
    """
    for directory in complete(run_dir):
        problem = damage(directory)
        if problem is None:
            return Checkpoint(directory)
        if tell:
            tell(f"checkpoint {directory.name} is damaged and passed over: {problem}")
        if set_aside:
            with contextlib.suppress(OSError):
                directory.rename(directory.with_name(f"damaged-{directory.name}"))
    return None


def damage(directory: Path) -> str | None:
    """Return what is wrong with a checkpoint directory, or None."""
    try:
        manifest = read_json(directory / MANIFEST)
        wrong = disagreements(directory, manifest["files"], manifest=MANIFEST)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    if manifest.get("format") != FORMAT:
        return f"format {manifest.get('format')!r}, this raytx reads {FORMAT}"
    return "; ".join(wrong) or None


def load(directory: str | Path) -> Checkpoint:
    """Open a checkpoint directory after checking its hashes; a run directory stands for its chosen checkpoint."""
    directory = Path(directory).expanduser().absolute()
    if (directory / "checkpoints").is_dir():
        return chosen(directory)
    if not (directory / MANIFEST).is_file():
        raise CheckpointError(f"{directory}: neither a run directory nor a checkpoint (no checkpoints/, no {MANIFEST})")
    if problem := damage(directory):
        raise CheckpointError(f"{directory}: damaged: {problem}")
    return Checkpoint(directory)


def chosen(run_dir: Path, plan: Plan | None = None) -> Checkpoint:
    """Return the checkpoint that a run's artifacts are made of: the best or the last, as the plan says.

    Without a plan it is the one the newest checkpoint was saved under. Where the best is damaged, the best of the
    others is taken.
    """
    passed_over: list[str] = []
    last = newest(run_dir, tell=passed_over.append)
    if last is None:
        raise CheckpointError(". ".join([f"{run_dir}: holds no complete checkpoint", *passed_over]))
    plan = plan or Plan.from_dict(last.plan)
    best = last
    if plan.recipe.save.keep == "best":
        for other in (Checkpoint(path) for path in complete(run_dir) if damage(path) is None):
            value = other.state.metrics.get(plan.metric)
            if value is not None and plan.better(value, best.state.metrics.get(plan.metric)):
                best = other
    return best


def retain(run_dir: Path, *, num_to_keep: int | None, best_step: int | None) -> None:
    """Remove checkpoints beyond the newest num_to_keep, and staging left by killed attempts; the best one stays."""
    directories = complete(run_dir)
    keep = {path.name for path in directories[:num_to_keep]}
    if best_step is not None:
        keep.add(_name(best_step))
    for path in directories:
        if path.name not in keep:
            _remove(path)
    for rubbish in (run_dir / "checkpoints").glob(".step-*"):
        shutil.rmtree(rubbish, ignore_errors=True)


def _remove(directory: Path) -> None:
    """Rename first: a half-deleted checkpoint must not look like one."""
    doomed = directory.with_name(f".{directory.name}.doomed")
    with contextlib.suppress(OSError):
        directory.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
