"""Names of models and tokenizers that are directories on this machine, and what is in them."""

from __future__ import annotations

from pathlib import Path

from raytx.files import sha256

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".data", ".gguf"}
"""Endings of files that hold a model's weights, which no processor reads."""


def is_local(place: str) -> bool:
    """Tell a directory from a hub name, which is `name` or `owner/name`; what is there wins, as in transformers."""
    return place.startswith((".", "/", "~")) or place.count("/") > 1 or Path(place).is_dir()


def hashes(place: str) -> dict[str, str]:
    """Return {file name: SHA-256} of a directory's files, weights aside; nothing for a hub name."""
    directory = Path(place).expanduser()
    files = sorted(directory.iterdir()) if directory.is_dir() else []
    return {path.name: sha256(path) for path in files if path.is_file() and path.suffix not in WEIGHTS}
