"""A run's directory: who owns it, what is trained in it, and on what software."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import yaml

from raytx import status, storage
from raytx.errors import DataError, RecipeError, ResourceError
from raytx.files import read_json, write_json, write_text
from raytx.plan import Plan, identity

PLAN = "plan.json"
TRIALS = "trials"
"""Directory of a search that holds a run for each trial."""
OUTCOME = "trial.json"
"""What a trial has come to, in its run directory."""
TRAINING, SEARCHING, EXPORTING = "training", "searching", "exporting"
"""What a process may be doing with a run that it holds."""
LOCK_WAIT_S = 0.5
"""Who looks whether a run is in use holds its lock for an instant."""
PACKAGES = (
    "raytx", "ray", "torch", "transformers", "deepspeed", "peft", "datasets", "tokenizers", "safetensors", "numpy",
    "onnx", "onnxruntime", "pydantic",
)  # fmt: skip


@contextlib.contextmanager
def own(plan: Plan, also: AbstractContextManager[object] | None = None) -> Iterator[Path]:
    """Hold a plan's run directory, and `also` what is given; refuse a second owner and a plan that learns something
    else."""
    with lock(plan.run_dir, doing=TRAINING), also or contextlib.nullcontext():
        check_same(plan)
        with status.recorded(plan.run_dir, TRAINING):
            yield plan.run_dir


@contextlib.contextmanager
def at_work(run_dir: Path, doing: str) -> Iterator[None]:
    """Hold a run's directory and record how what is done there ends."""
    with lock(run_dir, doing=doing), status.recorded(run_dir, doing):
        yield


@contextlib.contextmanager
def lock(run_dir: Path, *, doing: str) -> Iterator[None]:
    """Hold a run's directory for as long as this process lives, making it where it is missing.

    The lock is the kernel's, so it is gone with its owner however that ends.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / status.LOCK, "a+", encoding="utf-8")  # noqa: SIM115  held until the block or process ends
    except OSError as error:
        raise ResourceError(f"storage_path: cannot write {run_dir}: {error.strerror}") from None
    with file:
        if not _locked(file):
            owner = status.holder(run_dir)
            who = f" ({owner['doing']}, pid {owner['pid']} on {owner['host']})" if owner else ""
            raise ResourceError(
                f"run {run_dir.name!r} is in use by another process{who}, as {run_dir} is locked. Wait for it, or give "
                "this one another name"
            )
        status.claim(file, doing)
        yield


def _locked(file: IO[str]) -> bool:
    """Lock a file, trying for a moment; tell whether it is ours."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        else:
            return True


def record(plan: Plan) -> None:
    """Write down what is trained, and on what; refuse to go on with other data than the run has seen."""
    check_same_data(plan)
    write_json(plan.run_dir / PLAN, plan.to_dict())
    full = yaml.safe_dump(plan.recipe.dump(), sort_keys=False, allow_unicode=True)  # defaults may change, runs may not
    write_text(plan.run_dir / "recipe.yaml", full)
    write_json(plan.run_dir / "environment.json", environment())


def check_same(plan: Plan) -> None:
    """Raise RecipeError naming the keys, when the run that lives in this directory learns something else."""
    if (plan.run_dir / TRIALS).is_dir():
        raise RecipeError(f"{plan.recipe.name!r} in {plan.run_dir} is a search; give the run another name (name=...)")
    if (earlier := _earlier(plan)) is None:
        return
    changed = differences(identity(earlier["recipe"]), plan.identity())
    if changed:
        lines = "\n".join(f"  {key}: {old!r} in the run, {new!r} now" for key, (old, new) in changed.items())
        raise RecipeError(
            f"run {plan.recipe.name!r} in {plan.run_dir} learns something else, so it cannot go on:\n{lines}\n"
            "Give the new recipe another name (name=...), or put the values back"
        )


def check_same_data(plan: Plan) -> None:
    """Raise DataError when rows, tokenizer or labels are others than those the run has learned from."""
    earlier = _earlier(plan)
    if earlier is None or earlier["prepared"] is None:
        return
    if (old := earlier.get("content")) != plan.content:
        raise DataError(
            f"run {plan.recipe.name!r} in {plan.run_dir} has learned from other data, so it cannot go on: prepared "
            f"data {old} with {earlier['num_samples']} samples in the run, {plan.content} with {plan.num_samples} now. "
            f"Put the files back as they were{_versions(earlier, plan)}, or give the new run another name (name=...)"
        )


def _versions(earlier: Mapping[str, Any], plan: Plan) -> str:
    """Name what prepares data otherwise than it did, where versions have changed since."""
    old, new = ({"raytx": one["version"], **one["plugins"]} for one in (earlier, plan.to_dict()))
    changed = [f"{name} {old[name]} is {new.get(name, 'gone')}" for name in old if old[name] != new.get(name)]
    return f" (and the software, which may prepare them otherwise: {', '.join(changed)} now)" if changed else ""


def _earlier(plan: Plan) -> dict[str, Any] | None:
    """Return the plan of the run that lives in this directory, once it has a checkpoint to go on from."""
    path = plan.run_dir / PLAN
    if not path.is_file() or not _has_saved(plan):
        return None
    earlier: dict[str, Any] = read_json(path)
    return earlier


def _has_saved(plan: Plan) -> bool:
    if (store := storage.of(plan.recipe.storage_path)) is not None:
        return any(name.endswith("/manifest.json") for name in store.sizes(f"{plan.recipe.name}/checkpoints"))
    return any((plan.run_dir / "checkpoints").glob("step-*"))


def differences(old: Any, new: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Return {dotted path: (old, new)} of the leaves in which two plain values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in dict.fromkeys([*old, *new]):
            found |= differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    same = list(old) == list(new) if isinstance(old, list | tuple) and isinstance(new, list | tuple) else old == new
    return {} if same else {path: (old, new)}


def environment() -> dict[str, Any]:
    """Return the software and machine a run was made on, for its record."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "packages": versions,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
