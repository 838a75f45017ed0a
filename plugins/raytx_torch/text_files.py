"""Text files of a directory as rows, such as the Python standard library of the machine."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from raytx.components import DataConfig, Source
from raytx.errors import DataError
from raytx.files import digest, sha256
from raytx.sections import Section
from raytx.tasks.base import Row

STDLIB = "stdlib"
STDLIB_EXCLUDED = (
    "site-packages/*",
    "dist-packages/*",
    "test/*",
    "*/test/*",
    "*/tests/*",
    "*/idle_test/*",
)
"""Installed packages differ from machine to machine, and tests hold data and broken syntax on purpose."""


class TextFilesSplit(Section):
    """What is held out."""

    test: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the files held out. A file's name alone decides, so that adding files moves none across."""


class TextFiles(DataConfig):
    """Text files of a directory, one row each; `path: stdlib` is the Python standard library of this machine."""

    type: Literal["text-files"] = "text-files"
    path: str = STDLIB
    """A directory, a single file, or "stdlib"."""
    pattern: str | None = None
    """Glob below the directory; null takes **/*.py for stdlib and **/*.txt elsewhere."""
    exclude: tuple[str, ...] | None = None
    """Patterns of relative paths to leave out; null leaves out tests and installed packages of stdlib."""
    max_bytes: int | None = Field(None, gt=0)
    """Stop before the files exceed this; null takes all."""
    split: TextFilesSplit = TextFilesSplit()

    def local_files(self) -> Iterable[tuple[str, str]]:
        return () if self.path == STDLIB else (("path", self.path),)

    def build(self) -> Source:
        return TextFilesSource(self)


class TextFilesSource:
    """The files found, in the order of a hash of their names, so that a limit cuts across directories evenly."""

    def __init__(self, config: TextFiles) -> None:
        self.config = config
        self._undecodable: set[str] = set()

    @cached_property
    def files(self) -> dict[str, Path]:
        """The chosen files by relative path; raise DataError when there is none."""
        found = dict(sorted(self._found(), key=lambda item: _hash("order", item[0])))
        chosen = dict(self._limited(found))
        if not chosen:
            raise DataError(f"data.path={self.config.path}: {self._why_none(found)}")
        return chosen

    def _found(self) -> Iterator[tuple[str, Path]]:
        root = self._root
        if root.is_file():
            yield root.name, root
            return
        for path in root.glob(self._pattern):
            name = path.relative_to(root).as_posix()
            if path.is_file() and not any(fnmatch(name, pattern) for pattern in self._excluded):
                yield name, path

    def _limited(self, found: dict[str, Path]) -> Iterator[tuple[str, Path]]:
        room = self.config.max_bytes if self.config.max_bytes is not None else float("inf")
        for name, path in found.items():
            room -= path.stat().st_size
            if room < 0:
                return
            yield name, path

    def _why_none(self, found: dict[str, Path]) -> str:
        if found:
            return f"max_bytes={self.config.max_bytes} is less than the first of {len(found)} files holds"
        return f"no file matches pattern={self._pattern!r} below {self._root}, besides those excluded"

    @property
    def _root(self) -> Path:
        path = sysconfig.get_paths()["stdlib"] if self.config.path == STDLIB else self.config.path
        return Path(path).expanduser().absolute()

    @property
    def _pattern(self) -> str:
        return self.config.pattern or ("**/*.py" if self.config.path == STDLIB else "**/*.txt")

    @property
    def _excluded(self) -> tuple[str, ...]:
        if self.config.exclude is not None:
            return self.config.exclude
        return STDLIB_EXCLUDED if self.config.path == STDLIB else ()

    def fingerprint(self) -> str:
        contents = {name: sha256(path) for name, path in self.files.items()}
        return digest({"files": contents, "test": self.config.split.test})

    def rows(self, split: Literal["train", "test"]) -> Iterator[Row]:
        for name, path in self.files.items():
            if (_hash("split", name) < self.config.split.test) != (split == "test"):
                continue
            try:
                yield {"text": path.read_text(encoding="utf-8"), "path": name}
            except UnicodeDecodeError:
                self._undecodable.add(name)

    def remarks(self) -> list[str]:
        if not self._undecodable:
            return []
        count, first = len(self._undecodable), min(self._undecodable)
        return [f"{count} of {len(self.files)} files are not UTF-8 text and were skipped, {first} for one"]


def _hash(purpose: str, name: str) -> float:
    """Map a name to [0, 1), for each purpose independently."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{name}".encode()).digest()[:8]) / 2**64
