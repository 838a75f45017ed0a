"""One Hugging Face directory out of any strategy's checkpoint, written tensor by tensor.

The model is never built: its structure says which tensors there are, so every file's header is written before its first
number, and each tensor is read, made and written before the next. Peak memory is that of the largest tensor or, where
tensors are made together (an adapter and its layer, a fused layer and its parts), of the largest such group.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import yaml
from safetensors import safe_open

from raytx import checkpoint
from raytx.checkpoint import Checkpoint
from raytx.components import Model, TensorGroup, TensorHeader
from raytx.errors import ArtifactError, RecipeError
from raytx.files import open_to_readers, sha256, sync_directory, walk, write_json, write_text
from raytx.plan import Plan

DTYPES = ("float32", "bfloat16", "float16")
STORED = {
    "F64": "<f8", "I64": "<i8", "F32": "<f4", "I32": "<i4", "F16": "<f2", "BF16": "<u2", "I16": "<i2", "I8": "<i1",
    "U8": "<u1", "BOOL": "<?",
}  # fmt: skip
"""numpy's type for the bytes of each type that safetensors spells; bfloat16, which it has not, as whole numbers."""
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}

Dtype = Literal["float32", "bfloat16", "float16"]
Advance = Callable[[int, int], None]
"""Told bytes written and bytes in all, after each tensor."""
Shards = dict[str, dict[str, TensorHeader]]
"""What each file holds, in the order of its bytes, by file name."""


@dataclass(frozen=True)
class Consolidated:
    """What was written."""

    directory: Path
    step: int
    tensors: int
    bytes: int
    files: list[str]
    """The files that hold weights."""

    def told(self) -> str:
        """Return a line that tells a user what there is now."""
        files = f"{len(self.files)} files" if len(self.files) > 1 else self.files[0]
        return f"step {self.step}: {self.tensors} tensors, {self.bytes / 1e6:,.1f} MB in {files}, read back and equal"


def consolidate(
    path: str | Path,
    directory: str | Path,
    *,
    dtype: Dtype = "float32",
    max_shard_size: str = "5GB",
    adapter_only: bool = False,
    advance: Advance = lambda done, of: None,
) -> Consolidated:
    """Write the weights of a checkpoint, or of a run's chosen one, as a directory that from_pretrained opens.

    Adapters are merged into their base, or written alone in peft's own layout where `adapter_only` asks for it.
    Compression and exports of the recipe play no part. The directory is complete or absent.

    Raises RecipeError for a target that is not free or an option that does not fit the model, CheckpointError for a
    checkpoint that is damaged or another model's, ArtifactError when what was written does not read back.
    """
    limit, target = shard_bytes(max_shard_size), _free(Path(directory))
    source = checkpoint.load(path)
    plan, model = _recorded(source)
    with _staged(target) as staging, Stored(source) as stored:
        shutil.copytree(source.processor, staging, dirs_exist_ok=True)
        module = model.structure(source.processor)
        starting = model.weights(source.processor, seed=plan.recipe.train.seed)
        groups = model.consolidated(module, stored, starting, staging, dtype=dtype, adapter_only=adapter_only)
        groups = sorted(groups, key=_width, reverse=True)
        shards = arranged(groups) if adapter_only else arranged(groups, stem="model", limit=limit)
        _verify(staging, shards, _write(staging, shards, groups, advance))
        write_text(staging / "README.md", _card(plan, source, adapter_only=adapter_only))
    headers = [header for held in shards.values() for header in held.values()]
    return Consolidated(target, source.step, len(headers), sum(map(_bytes, headers)), list(shards))


def shard_bytes(text: str) -> int:
    """Return the bytes that a size such as 5GB, 500MB or 4096 stands for; raise RecipeError where it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B)?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * UNITS[(found[2] or "B").upper()]) if found else 0
    if size < 1:
        raise RecipeError(f"max_shard_size: {text!r} is no size; give a number with B, KB, MB or GB, such as 5GB")
    return size


def _free(directory: Path) -> Path:
    target = directory.expanduser().resolve()
    if target.is_dir() and not any(target.iterdir()):
        return target
    if target.exists():
        what = "is not empty" if target.is_dir() else "is a file"
        raise RecipeError(f"{directory}: {what}; nothing is overwritten, so give a new or an empty directory")
    return target


def _recorded(source: Checkpoint) -> tuple[Plan, Model]:
    """Return the plan a checkpoint was saved under, and its model; whoever wrote it may not decide that code runs."""
    plan = Plan.from_dict(source.plan)
    if "save_pretrained" not in plan.recipe.model.provides:
        raise RecipeError(f"model.type={plan.recipe.model.type}: it has no Hugging Face form to write")
    return plan, plan.recipe.model.distrusted().build()


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """Make a directory beside the target, which becomes the target if all goes well and is removed if not."""
    staging = target.with_name(f".{target.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        open_to_readers(staging)
        for path in walk(staging):
            _sync(path)
        staging.rename(target)
        sync_directory(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------------ reading


class Stored(Mapping[str, np.ndarray]):
    """The trained weights of a checkpoint by name, each read when it is asked for.

    Files are read, not mapped: pages of a mapped file stay with the process. They stay open: a run that goes on may
    retire its checkpoint meanwhile.
    """

    def __init__(self, source: Checkpoint) -> None:
        self._open = contextlib.ExitStack()
        self._places: dict[str, tuple[BinaryIO, int, TensorHeader]] = {}
        for name in source.manifest["files"]:
            if name.startswith("weights-"):
                self._add(self._open.enter_context((source.directory / name).open("rb")))

    def _add(self, file: BinaryIO) -> None:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                place = 8 + length + entry["data_offsets"][0]
                self._places[name] = (file, place, TensorHeader(entry["dtype"], tuple(entry["shape"])))

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __getitem__(self, name: str) -> np.ndarray:
        file, place, header = self._places[name]
        file.seek(place)
        return np.fromfile(file, STORED[header.dtype], _bytes(header) // _itemsize(header)).reshape(header.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


# ------------------------------------------------------------------------------------------------------ writing


def arranged(groups: Iterable[TensorGroup], *, stem: str = "adapter_model", limit: int | None = None) -> Shards:
    """Spread tensors over files of at most `limit` bytes, in their order; a larger tensor has a file of its own.

    Without a limit there is one file, which is all that peft reads.
    """
    files: list[dict[str, TensorHeader]] = [{}]
    held = 0
    for name, header in (item for group in groups for item in group.headers.items()):
        if limit is not None and files[-1] and held + _bytes(header) > limit:
            files.append({})
            held = 0
        files[-1][name] = header
        held += _bytes(header)
    if len(files) == 1:
        return {f"{stem}.safetensors": files[0]}
    return {f"{stem}-{place:05d}-of-{len(files):05d}.safetensors": one for place, one in enumerate(files, 1)}


def _write(staging: Path, shards: Shards, groups: Iterable[TensorGroup], advance: Advance) -> dict[str, str]:
    """Write every file, and the index where there are several; return the SHA-256 of what each was given."""
    made = (item for group in groups for item in group.make())
    total = sum(_bytes(header) for held in shards.values() for header in held.values())
    hashes, done = {}, 0
    for name, headers in shards.items():
        with open(staging / name, "wb") as file:
            digest = hashlib.sha256(prologue(headers))
            file.write(prologue(headers))
            for key, header in headers.items():
                data = _data(key, header, *next(made))
                file.write(data)
                digest.update(data)
                advance(done := done + _bytes(header), total)
                del data  # or it would be held while the next one is made
        hashes[name] = digest.hexdigest()
    if len(shards) > 1:
        places = {key: name for name, headers in shards.items() for key in headers}
        write_json(staging / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    return hashes


def prologue(headers: Mapping[str, TensorHeader]) -> bytes:
    """Return what a safetensors file says before its numbers: a length and JSON, padded so that these are aligned."""
    ends = list(accumulate(map(_bytes, headers.values())))
    said: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for (name, header), end in zip(headers.items(), ends, strict=True):
        said[name] = {"dtype": header.dtype, "shape": header.shape, "data_offsets": [end - _bytes(header), end]}
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _data(key: str, header: TensorHeader, name: str, array: np.ndarray) -> memoryview:
    if (name, array.dtype, array.shape) != (key, np.dtype(STORED[header.dtype]), header.shape):
        raise ArtifactError(
            f"{name} was made as {array.dtype} {array.shape} where {key} was announced as {header.dtype} "
            f"{header.shape}; the model component is at fault"
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _verify(staging: Path, shards: Shards, hashes: Mapping[str, str]) -> None:
    """Open every file again, as any reader would, and hold it to what it was given."""
    for name, headers in shards.items():
        if sha256(staging / name) != hashes[name] or _headers(staging / name) != headers:
            raise ArtifactError(f"{staging / name} does not read back as it was written; is the storage sound?")


def _headers(path: Path) -> dict[str, TensorHeader]:
    with safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  no mapping
        return {name: TensorHeader(one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}


def _width(group: TensorGroup) -> int:
    """Wide numbers come first in a file, as safetensors' own writer has it, so that each begins at a multiple of its
    size."""
    return max(map(_itemsize, group.headers.values()), default=0)


def _itemsize(header: TensorHeader) -> int:
    return np.dtype(STORED[header.dtype]).itemsize


def _bytes(header: TensorHeader) -> int:
    return int(np.prod(header.shape, dtype=np.int64)) * _itemsize(header)


def _card(plan: Plan, source: Checkpoint, *, adapter_only: bool) -> str:
    """Return the model card: YAML front matter for hubs, then where the weights come from."""
    recipe = plan.recipe
    front = {"library_name": "peft" if adapter_only else "transformers", "tags": ["raytx", recipe.model.type]}
    metrics = "\n".join(f"- {name}: {value:.4f}" for name, value in source.state.metrics.items()) or "- none"
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {recipe.name}

{"The adapter" if adapter_only else "The weights"} of step {source.step} of {plan.steps}, consolidated from a checkpoint
of {plan.world_size} x {recipe.strategy.type} (raytx {plan.version}).

## Evaluation (held-out split)

{metrics}

## Recipe

```yaml
{yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True).strip()}
```
"""
