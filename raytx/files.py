"""Files that are whole or absent: atomic writes, hashes, and safetensors that never run code."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = 8 << 20
"""Bytes that are hashed and written at a time, side by side and both without Python's lock."""
CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
"""What file systems say that cannot synchronise a directory."""
SPELLED = {
    "float64": "F64", "int64": "I64", "uint64": "U64", "float32": "F32", "int32": "I32", "uint32": "U32",
    "float16": "F16", "int16": "I16", "uint16": "U16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""How safetensors spells numpy's types."""


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part: temporary, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_text(path, as_json(value))


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=False, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its own hash, so that no change of a byte in it goes unnoticed."""
    write_text(path, _sealed(value))


def read_sealed(path: Path) -> dict[str, Any]:
    """Return what `write_sealed` wrote; raise ValueError when a byte is not as it was."""
    return parse_sealed(path.read_bytes())


def parse_sealed(data: bytes) -> dict[str, Any]:
    """Return what was sealed; raise ValueError when a byte is not as it was."""
    text = data.decode()
    value: dict[str, Any] = json.loads(text)
    value.pop("sha256", None)
    if _sealed(value) != text:
        raise ValueError("its own SHA-256 differs")
    return value


def _sealed(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return json.dumps({**value, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1, ensure_ascii=False)


def write_safetensors(
    path: Path, arrays: Mapping[str, np.ndarray], *, advance: Callable[[int], None] = lambda size: None
) -> dict[str, Any]:
    """Write contiguous arrays and wait until the disk has them; return {"bytes": size, "sha256": hash}.

    The hash is taken of what was handed over, not of what a disk may have made of it. `advance` is told the bytes of
    each piece that was written. Raises OSError.
    """
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))  # so each is aligned, as readers expect
    digest, size = hashlib.sha256(), 0
    with ThreadPoolExecutor(1, "raytx-hash") as beside, open(path, "wb") as file:
        for piece in _pieces(arrays):
            beside.submit(digest.update, piece)
            size += file.write(piece)
            advance(len(piece))
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _pieces(arrays: Mapping[str, np.ndarray]) -> Iterator[memoryview]:
    yield memoryview(_prologue(arrays))
    for array in arrays.values():
        data = array.reshape(-1).view(np.uint8).data
        yield from (data[start : start + CHUNK] for start in range(0, len(data), CHUNK))


def _prologue(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return what a safetensors file says before its numbers: a length and JSON, padded so that these are aligned."""
    said: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for (name, array), end in zip(arrays.items(), accumulate(a.nbytes for a in arrays.values()), strict=True):
        offsets = [end - array.nbytes, end]
        said[name] = {"dtype": SPELLED[array.dtype.name], "shape": array.shape, "data_offsets": offsets}
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def sync(path: Path) -> None:
    """Wait until the disk has a file's bytes."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make a rename in a directory durable, where the file system can (some network ones cannot). Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Return a short stable name for a JSON value, used for cache keys and plan fingerprints."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def inventory(directory: Path, *, exclude: Collection[str] = frozenset()) -> dict[str, dict[str, Any]]:
    """Return {relative path: {"bytes": size, "sha256": hash}} for every file below a directory."""
    return {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in walk(directory)
        if str(path.relative_to(directory)) not in exclude
    }


def open_to_readers(directory: Path) -> None:
    """Give every file the mode that the umask allows; safetensors creates its own readable by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in walk(directory):
        path.chmod(0o666 & ~mask)


def walk(directory: Path) -> Iterator[Path]:
    """Yield the files below a directory in a stable order."""
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def disagreements(
    directory: Path,
    files: Mapping[str, Mapping[str, Any]],
    *,
    manifest: str,
    share: tuple[int, int] = (0, 1),
    advance: Callable[[int], object] = int,
) -> list[str]:
    """Return one line per file that is missing, of another size or hash than an inventory says, or not in it at all.

    The manifest that holds the inventory is the one file that it does not list. `share` (n, of) is for readers who
    divide the work: each hashes every of-th file, beginning with its own number, and the first looks for strange ones.
    `advance` is told the bytes of each file that has been looked at.
    """
    first, readers = share
    listed = {*files, manifest}
    there = walk(directory) if first == 0 else ()
    found = [f"{n}: not in the manifest" for p in there if (n := str(p.relative_to(directory))) not in listed]
    for name in sorted(files)[first::readers]:
        if problem := _disagreement(directory / name, files[name]):
            found.append(f"{name}: {problem}")
        advance(files[name]["bytes"])
    return found


def _disagreement(path: Path, wanted: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return "missing"
    if path.stat().st_size != wanted["bytes"]:
        return f"{path.stat().st_size} bytes, the manifest says {wanted['bytes']}"
    return None if sha256(path) == wanted["sha256"] else "its SHA-256 differs from the manifest"
