"""A run's directory: who owns it, what is trained in it, and on what software."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from raytx.errors import RecipeError, ResourceError
from raytx.files import read_json, write_json, write_text
from raytx.plan import Plan, identity

PLAN = "plan.json"
PACKAGES = (
    "raytx", "ray", "torch", "transformers", "deepspeed", "peft", "datasets", "tokenizers", "safetensors", "numpy",
    "onnx", "onnxruntime", "pydantic",
)  # fmt: skip


@contextlib.contextmanager
def own(plan: Plan) -> Iterator[Path]:
    """Hold a run's directory for as long as this process lives; refuse a second owner and a plan that differs.

    The lock is the kernel's, so it is gone with its owner however that ends.
    """
    run_dir = plan.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "a+")  # noqa: SIM115  held until the process or the block ends
    except OSError as error:
        raise ResourceError(f"storage_path: cannot write {run_dir}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(
                f"run {plan.recipe.name!r} is in use by another process, as {run_dir} is locked. Wait for it, or give "
                "this one another name"
            ) from None
        check_same(plan)
        write_json(run_dir / PLAN, plan.to_dict())
        write_text(run_dir / "recipe.yaml", plan.recipe.to_yaml())
        write_json(run_dir / "environment.json", environment())
        yield run_dir


def check_same(plan: Plan) -> None:
    """Raise RecipeError naming the keys, when the run that lives in this directory learns something else."""
    path = plan.run_dir / PLAN
    if not path.is_file() or not any((plan.run_dir / "checkpoints").glob("step-*")):
        return
    changed = differences(identity(read_json(path)["recipe"]), plan.identity())
    if changed:
        lines = "\n".join(f"  {key}: {old!r} in the run, {new!r} now" for key, (old, new) in changed.items())
        raise RecipeError(
            f"run {plan.recipe.name!r} in {plan.run_dir} learns something else, so it cannot go on:\n{lines}\n"
            "Give the new recipe another name (name=...), or put the values back"
        )


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
