"""Committed checkpoints: one format for every strategy, complete or absent.

    checkpoints/step-00000200/
        weights-00000-00000.safetensors      fp32, keyed by Hugging Face parameter name; <rank>-<shard>
        optimizer-00000-00000.safetensors    keyed "<name>|exp_avg" and "<name>|exp_avg_sq"
        golden.safetensors                   a few held-out samples and the logits the trained engine gave them
        processor/  demo.json                tokenizer and labels; requests made of held-out samples
        plan.json  state.json                what was trained, and how far
        manifest.json                        every file's size and SHA-256, every tensor's shape, its own SHA-256; last

A directory is written under another name and renamed when its manifest is on disk, so a run that is killed at any
moment leaves complete checkpoints and rubbish that is known to be rubbish. Nothing in it is pickled. Who writes which
part of it, and when, is saving.py's.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from raytx.artifact import GOLDEN, Golden
from raytx.components import Part, TensorHeader
from raytx.errors import CheckpointError
from raytx.files import (
    SPELLED,
    as_json,
    disagreements,
    inventory,
    read_json,
    read_sealed,
    sync,
    sync_directory,
    walk,
    write_safetensors,
    write_sealed,
)  # fmt: skip
from raytx.optimizer import state_tensors
from raytx.plan import Plan
from raytx.sections import Optim
from raytx.tasks.base import Request

UNREADABLE = "the storage does not let it be read: "
"""Begins what is wrong with a checkpoint that may be whole: it is passed over, but stays where it is."""
FOREIGN = "format "
"""Begins what is said of a checkpoint that another version of raytx wrote: it is whole, but not for this one."""
REPLACED = ".replaced"
"""Ends the name of a checkpoint while another of the same step takes its place; it is whole until that is there."""
STAGING = "staging"
"""Ends the name of a directory in which an attempt writes: .<name>.<attempt>.staging"""
OTHER_VERSION = (
    "Another version of raytx wrote it, which its plan.json names: go on with that one, or begin anew under another "
    "name (name=...)"
)
MANIFEST = "manifest.json"
FORMAT = 3

Files = dict[str, dict[str, Any]]
"""Of each file by name its bytes, its sha256 and, where it holds a rank's tensors, their types and shapes by key."""
Demo = list[tuple[Request, str]]


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds besides tensors."""

    plan: Plan
    state: State
    golden: Golden
    demo: Demo


@dataclass(frozen=True)
class State:
    """How far a run is. Data position and dropout follow from the step; see batches.py."""

    step: int = 0
    """Steps done: optimizer updates, and those left out because of what is not finite."""
    best: float | None = None
    """Best value of the metric so far."""
    best_step: int | None = None
    metric: str | None = None
    """Which metric and mode best is of; another recipe may ask for another."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The evaluation of this very step; empty when there was none."""
    seconds: float = 0.0
    """Wall-clock seconds spent in training, over all attempts."""
    nonfinite: int = 0
    """Steps that updated nothing, as their loss or gradient norm was not finite; see train.max_nonfinite."""
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
        place = key(name, part)
        if not self._places:
            self._open()
        if place not in self._places:
            raise CheckpointError(f"{self.directory}: holds no {part} of {name!r}; was it saved from another model?")
        array: np.ndarray = self._places[place].get_tensor(place)
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


# ---------------------------------------------------------------------------------------------------- writing one


def promised(module: Any, optim: Optim) -> dict[str, TensorHeader]:
    """Return the tensors that a checkpoint of a structure must hold, by key: trained parameters, saved buffers and the
    optimizer's state. Asked before a strategy cuts the structure, so that no strategy can forget one unnoticed.

    Buffers are promised without a type: a strategy may hold them in the precision it computes in.
    """
    trained = {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
    kept, buffers = module.state_dict().keys(), dict(module.named_buffers())
    found = {key(name, "weight"): TensorHeader("F32", shape) for name, shape in trained.items()}
    for name, buffer in buffers.items():
        if name in kept and buffer.numel():
            found[key(name, "weight")] = TensorHeader("", tuple(buffer.shape))
    for name, shape in trained.items():
        for part, tensor in state_tensors(optim, shape).items():
            found[key(name, part)] = TensorHeader(SPELLED[tensor.dtype], tensor.shape)
    return found


def broken_promises(files: Sequence[Files], promised: Mapping[str, TensorHeader]) -> list[str]:
    """Return one line for each tensor that ranks wrote empty, of another shape, twice or not at all."""
    written = [item for of_rank in files for file in of_rank.values() for item in file["tensors"].items()]
    times = Counter(name for name, _ in written)
    found = [f"{name} is missing" for name in promised if name not in times]
    found += [f"{name} was written {count} times" for name, count in times.items() if count > 1]
    for name, text in dict(written).items():
        if "0" in text.strip("]").partition("[")[2].split(","):
            found.append(f"{name} is empty: {text}")
        elif name in promised and not text.endswith(spelled(promised[name])):
            found.append(f"{name} is {text}, the model has {spelled(promised[name])}")
    return found


def spelled(header: TensorHeader) -> str:
    """Return a tensor's type and shape as the manifest has them, such as F32[320,32]."""
    return f"{header.dtype}[{','.join(map(str, header.shape))}]"


def seal(staging: Path, target: Path, *, files: Files, content: Content) -> None:
    """Turn a staging directory, in which every rank has written its files, into a checkpoint.

    May be called again after it failed. Raises OSError; CheckpointError when files are not there any more.
    """
    if staging.is_dir() or not target.is_dir():
        if lost := [name for name, entry in files.items() if not _has_size(staging / name, entry["bytes"])]:
            raise CheckpointError(f"{', '.join(lost)}: written, and now gone from {staging.parent} or of another size")
        finish(staging, files=files, content=content)
        old = target.with_name(f"{target.name}{REPLACED}")
        if target.is_dir() and damage(target) is None:  # saved when an order broke into the step's evaluation
            _remove(old)  # of a process that was killed below
            target.rename(old)
        _set_aside(target)
        staging.rename(target)
        sync_directory(target.parent)
        _remove(old)
    sync_directory(target.parent)


def finish(staging: Path, *, files: Files, content: Content) -> None:
    """Write what is no rank's share, wait until the disk has all, and write the manifest. Raises OSError."""
    write_safetensors(staging / GOLDEN, content.golden.arrays())
    _copy(content.plan.data_dir / "processor", staging / "processor")
    told = {"demo": content.demo, "plan": content.plan.to_dict(), "state": asdict(content.state)}
    for name, value in told.items():
        (staging / f"{name}.json").write_text(as_json(value), encoding="utf-8")
    others = inventory(staging, exclude={*files, MANIFEST})
    for name in others.keys() - {GOLDEN}:
        sync(staging / name)
    for directory in {staging, *((staging / name).parent for name in others)}:
        sync_directory(directory)
    write_sealed(staging / MANIFEST, {"format": FORMAT, "step": content.state.step, "files": {**files, **others}})


def _copy(source: Path, target: Path) -> None:
    """Copy a directory's files; unlike shutil's copytree it raises a plain OSError, and copies no modes."""
    for path in walk(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


# --------------------------------------------------------------------------------------------------------- names


def directory_of(run_dir: Path, step: int) -> Path:
    """Return where the checkpoint of a step is, or would be."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def key(name: str, part: Part) -> str:
    """Return what a tensor is called in a checkpoint's files."""
    return name if part == "weight" else f"{name}|{part}"


# ------------------------------------------------------------------------------------------- finding and judging


def step_of(directory: Path) -> int:
    """Return the step that a checkpoint directory's name says."""
    return int(directory.name.removesuffix(REPLACED).rpartition("-")[2])


def complete(run_dir: Path) -> list[Path]:
    """Return the checkpoint directories of a run that have a manifest, newest first. Their hashes are not checked."""
    directories = [run_dir / "checkpoints" / name for name in _started(run_dir)]
    return [path for path in directories if (path / MANIFEST).is_file()]


def newest(
    run_dir: Path,
    *,
    tell: Callable[[str], None] | None = None,
    set_aside: bool = False,
    rank: int = 0,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> Checkpoint | None:
    """Return the newest checkpoint whose every file is as its manifest says, or None; say which were passed over.

    Ranks that call it together, with the engine's `gather`, share the hashing and all get the same one. Where it is
    asked for, damaged ones are renamed, so that nothing counts them as checkpoints again. Raises CheckpointError, on
    every rank, at one that not all see alike or that another version wrote.
    """
    seen = gather(_started(run_dir))
    for name in seen[0]:
        directory = run_dir / "checkpoints" / name
        problems = gather(damage(directory, share=(rank, len(seen))))
        if not any(problems):
            return Checkpoint(directory)
        told = "; ".join(dict.fromkeys(filter(None, problems)))
        judged = gather(damage(directory) if rank == 0 else None)[0]
        if judged is None:  # rank 0 sees it whole
            blind = [place for place, problem in enumerate(problems) if problem]
            raise CheckpointError(
                f"{directory}: whole as rank 0 sees it, but not as {', '.join(f'rank {place}' for place in blind)} "
                f"{'does' if len(blind) == 1 else 'do'}: {told}. Is the storage mounted on every node?"
            )
        if judged.startswith(FOREIGN):
            raise CheckpointError(f"{directory}: {judged}. {OTHER_VERSION}")
        if tell:
            tell(f"checkpoint {name} is damaged and passed over: {told}")
        if set_aside and rank == 0 and not judged.startswith(UNREADABLE):
            _set_aside(directory)
    return None


def _started(run_dir: Path) -> list[str]:
    """Return the names of what claims to be a checkpoint, newest first; a replaced one after what replaces it."""
    names = (path.name for path in (run_dir / "checkpoints").glob("step-*"))
    return sorted(names, key=lambda name: (name.removesuffix(REPLACED), not name.endswith(REPLACED)), reverse=True)


def _set_aside(directory: Path) -> None:
    """Rename what is damaged, if it is there; of several with one name the first is kept."""
    with contextlib.suppress(OSError):
        directory.rename(directory.with_name(f"damaged-{directory.name}"))
    if directory.exists():
        _remove(directory)


def damage(directory: Path, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """Return what is wrong with a checkpoint directory, or None; `share` is as `disagreements` has it."""
    return "; ".join(flaws(directory, share=share)) or None


def flaws(directory: Path, *, share: tuple[int, int] = (0, 1), advance: Callable[[int], object] = int) -> list[str]:
    """Return what is wrong with a checkpoint directory, each "<file>: <reason>"; `advance` is told the bytes read."""
    try:
        manifest = read_sealed(directory / MANIFEST)
        if (foreign := other_format(manifest)) is not None:
            return [foreign]
        return disagreements(directory, manifest["files"], manifest=MANIFEST, share=share, advance=advance)
    except FileNotFoundError as error:
        return [f"{Path(error.filename).name}: missing"]
    except OSError as error:
        return [f"{UNREADABLE}{error.strerror or error} ({error.filename})"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST}: cannot be read ({type(error).__name__}: {error})"]


def other_format(manifest: Mapping[str, Any]) -> str | None:
    """Return what is to be said of a manifest that another version of raytx has sealed, or None."""
    return None if manifest["format"] == FORMAT else f"{FOREIGN}{manifest['format']!r}, this raytx reads {FORMAT}"


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


def retain(run_dir: Path, *, step: int, attempt: str, num_to_keep: int | None, best_step: int | None) -> None:
    """Remove checkpoints beyond the newest num_to_keep, and staging left by killed attempts; the best one stays.

    Called when an attempt has just committed the checkpoint of a step, which is the newest that counts: those ahead of
    it could not be read when the run went on from an earlier one, and they may be whole.
    """
    there = [path for path in complete(run_dir) if step_of(path) <= step]
    keep = set(list(dict.fromkeys(map(step_of, there)))[:num_to_keep]) | {best_step}
    for path in there:
        if step_of(path) not in keep or _is_replaced(path):
            _remove(path)
    sweep(run_dir, until=attempt)


def _is_replaced(directory: Path) -> bool:
    name = directory.name.removesuffix(REPLACED)
    return name != directory.name and directory.with_name(name).is_dir()


def drop(run_dir: Path, *, but: Collection[int]) -> None:
    """Remove all checkpoints but those of some steps from a directory that is a cache of them."""
    for path in complete(run_dir):
        if step_of(path) not in but:
            _remove(path)


def make_room(run_dir: Path) -> None:
    """Make the directory of a run's checkpoints, or rid it of rubbish where there is one. Raises OSError."""
    directory = run_dir / "checkpoints"
    directory.mkdir(parents=True, exist_ok=True)
    for made in (run_dir, run_dir.parent):
        sync_directory(made)
    sweep(run_dir)


def sweep(run_dir: Path, *, until: str | None = None) -> None:
    """Remove what killed attempts have left half written or half removed, but for what later ones write than `until`:
    a process that was given up may still be at it."""
    for rubbish in (run_dir / "checkpoints").glob(".step-*"):
        *_, attempt, kind = rubbish.name.split(".")
        if until is None or kind != STAGING or attempt <= until:
            shutil.rmtree(rubbish, ignore_errors=True)


def _remove(directory: Path) -> None:
    """Rename first, for good: a half-deleted checkpoint must not look like one, even after a power failure."""
    doomed = directory.with_name(f".{directory.name}.doomed")
    with contextlib.suppress(OSError):
        directory.rename(doomed)
        sync_directory(directory.parent)
        shutil.rmtree(doomed, ignore_errors=True)
