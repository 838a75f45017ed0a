"""Files that are whole or absent: atomic writes, hashes, and safetensors that never run code."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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
    write_text(path, json.dumps(value, indent=2, sort_keys=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def sync_directory(path: Path) -> None:
    """Make a rename in a directory durable; file systems that cannot (some network ones) are left as they are."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
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


def inventory(directory: Path, *, exclude: frozenset[str] = frozenset()) -> dict[str, dict[str, Any]]:
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


def disagreements(directory: Path, files: dict[str, dict[str, Any]], *, manifest: str) -> list[str]:
    """Return one line per file that is missing, of another size or hash than an inventory says, or not in it at all.

    The manifest that holds the inventory is the one file that it does not list.
    """
    listed = {*files, manifest}
    found = [f"{n}: not in the manifest" for p in walk(directory) if (n := str(p.relative_to(directory))) not in listed]
    for name, wanted in files.items():
        path = directory / name
        if not path.is_file():
            found.append(f"{name}: missing")
        elif path.stat().st_size != wanted["bytes"]:
            found.append(f"{name}: {path.stat().st_size} bytes, the manifest says {wanted['bytes']}")
        elif sha256(path) != wanted["sha256"]:
            found.append(f"{name}: its SHA-256 differs from the manifest")
    return found
