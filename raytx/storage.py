"""A storage that is named by a URI: files put there and fetched, through pyarrow's file systems or fsspec's.

A node works in a local directory that stands for it. Nothing here assumes more than an object store gives: a file is
there whole or not at all, there is no renaming, and who lists sees what was written before.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlsplit

from raytx.files import CHUNK, digest, walk

PAUSES_S = (1.0, 4.0, 15.0)
"""Seconds between tries of what fails, before it is given up."""
AT_ONCE = 8
"""Files of a directory that are on their way at once."""
ARROW_SCHEMES = frozenset({"s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss", "file"})
"""Those that pyarrow opens itself; all others are fsspec's."""
WITHOUT_DIRECTORIES = frozenset({"s3", "gcs"})
"""pyarrow's names of file systems in which a file needs no directory to be made for it."""
Item = TypeVar("Item")
Found = TypeVar("Found")
SECRET = re.compile(r"key|secret|token|passw|credential|sig\b|signature", re.IGNORECASE)


def is_uri(path: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def of(storage_path: str) -> Store | None:
    """Return the store that a storage path names, or None where it is a directory."""
    return _store(storage_path) if is_uri(storage_path) else None


@functools.cache
def _store(uri: str) -> Store:
    return Store(uri)


def directory(storage_path: str) -> Path:
    """Return where the runs of a storage path are on this node: for a URI, a directory of a cache."""
    if not is_uri(storage_path):
        return Path(storage_path).expanduser().absolute()
    root = Path(os.environ.get("RAYTX_CACHE") or "~/.cache/raytx").expanduser().absolute()
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", storage_path.partition("?")[0]).strip("-")[:80]
    return root / f"{readable}-{digest(storage_path)}"


def split(uri: str) -> tuple[str, str]:
    """Return the storage path and the name of a run's URI."""
    place, mark, query = uri.partition("?")
    storage_path, _, name = place.rstrip("/").rpartition("/")
    return f"{storage_path}{mark}{query}", name


def token(directory: Path) -> str:
    """Return a name for a local directory, the same for all processes that share it and different from any other's."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ".place"
    with contextlib.suppress(FileExistsError), tempfile.NamedTemporaryFile("w", dir=directory) as file:
        file.write(uuid.uuid4().hex)
        file.flush()
        os.link(file.name, path)  # of several who try at once, one has the say
    return path.read_text()


def refusal(uri: str) -> str | None:
    """Return what is wrong with a storage URI, or None; asks no server."""
    parts = urlsplit(uri)
    if parts.password is not None or (parts.username and parts.scheme == "s3"):
        return f"{parts.scheme}://...@: a recipe is no place for credentials. {_instead(parts.scheme)}"
    for key, _ in parse_qsl(parts.query, keep_blank_values=True):
        if SECRET.search(key):
            return f"{parts.scheme}://...?{key}=: a recipe is no place for credentials. {_instead(parts.scheme)}"
    if not parts.netloc and not parts.path.strip("/"):
        return f"{uri!r} names no bucket or directory"
    return None if parts.scheme in _schemes() else f"no file system for {parts.scheme}:// is known to pyarrow or fsspec"


def _instead(scheme: str) -> str:
    names = " (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)" if scheme == "s3" else ""
    return f"Put them into the environment of every node{names} or into the provider's own files"


def _schemes() -> set[str]:
    import fsspec

    return {*ARROW_SCHEMES, *fsspec.available_protocols()}


class StoreError(OSError):
    """A store does not do what it is asked for."""


class Seen(NamedTuple):
    """A file of a store, as a listing has it."""

    size: int
    changed: float
    """In seconds since 1970, by the store's clock; 0 where it does not tell."""


@dataclass(frozen=True)
class Store:
    """A storage. Names are paths below its URI, with slashes. Methods raise OSError and nothing else."""

    uri: str

    def put(self, path: Path, name: str, *, advance: Callable[[int], object] = int) -> None:
        """Copy a local file there, piece by piece; `advance` is told the bytes of each."""
        with open(path, "rb") as source, self._writing(name) as sink:
            while piece := source.read(CHUNK):
                sink.write(piece)
                advance(len(piece))

    def write(self, name: str, data: bytes) -> None:
        with self._writing(name) as sink:
            sink.write(data)

    def get(self, name: str, path: Path, *, advance: Callable[[int], object] = int) -> str:
        """Fetch a file to a local path, whole or not at all; return its SHA-256. FileNotFoundError where there is none.

        A local disk need not have it yet when this returns: it can be fetched again.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, hashed = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp"), hashlib.sha256()
        try:
            with _plainly(), open(temporary, "wb") as sink, self._files.open_input_stream(self._at(name)) as source:
                while piece := source.read(CHUNK):
                    hashed.update(piece)
                    sink.write(piece)
                    advance(len(piece))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return hashed.hexdigest()

    def read(self, name: str) -> bytes | None:
        """Return a small file's content, or None where there is none."""
        try:
            with _plainly(), self._files.open_input_stream(self._at(name)) as source:
                return bytes(source.read())
        except FileNotFoundError:
            return None

    def sizes(self, name: str = "") -> dict[str, int]:
        """Return the bytes of every file below a directory, as `listed` does."""
        return {name: seen.size for name, seen in self.listed(name).items()}

    def listed(self, name: str = "") -> dict[str, Seen]:
        """Return every file below a directory, by their names below it; none where it is not there."""
        from pyarrow.fs import FileSelector, FileType

        base = self._at(name)
        with _plainly():
            found = self._files.get_file_info(FileSelector(base, recursive=True, allow_not_found=True))
        start = len(base.strip("/")) + 1
        return {
            info.path.strip("/")[start:]: Seen(info.size, (info.mtime_ns or 0) / 1e9)
            for info in found
            if info.type == FileType.File
        }

    def remove(self, name: str) -> None:
        """Remove a file, where there is one."""
        with contextlib.suppress(FileNotFoundError), _plainly():
            self._files.delete_file(self._at(name))

    # ---- whole directories

    def put_directory(self, directory: Path, name: str, *, last: str) -> None:
        """Copy a directory there, one file after all others: where that one is, so is the rest."""
        names = [str(path.relative_to(directory)) for path in walk(directory)]
        together(lambda one: persistently(lambda: self.put(directory / one, f"{name}/{one}")), set(names) - {last})
        persistently(lambda: self.put(directory / last, f"{name}/{last}"))

    def get_directory(self, name: str, directory: Path, *, last: str) -> bool:
        """Fetch what `put_directory` put there, one file after all others; return whether it is all there."""
        names = persistently(lambda: self.sizes(name))
        if last not in names:
            return False
        together(lambda one: persistently(lambda: self.get(f"{name}/{one}", directory / one)), set(names) - {last})
        persistently(lambda: self.get(f"{name}/{last}", directory / last))
        return True

    def remove_directory(self, name: str) -> None:
        """Remove a directory with all that is in it, where there is one."""
        with contextlib.suppress(FileNotFoundError), _plainly():
            self._files.delete_dir(self._at(name))

    # ---- the file system

    @functools.cached_property
    def _opened(self) -> tuple[Any, str]:
        """The file system and the path in it. Opened when it is first used: that may start threads."""
        from pyarrow import fs

        with _plainly():
            if urlsplit(self.uri).scheme in ARROW_SCHEMES:
                files, path = fs.FileSystem.from_uri(self.uri)
                return files, path
            from fsspec.core import url_to_fs

            files, path = url_to_fs(self.uri)
            return fs.PyFileSystem(fs.FSSpecHandler(files)), path

    @property
    def _files(self) -> Any:
        return self._opened[0]

    def _at(self, name: str) -> str:
        base = self._opened[1].rstrip("/")
        return f"{base}/{name}" if name else base

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[Any]:
        with _plainly():
            place = self._at(name)
            if self._files.type_name not in WITHOUT_DIRECTORIES:
                self._files.create_dir(place.rpartition("/")[0], recursive=True)
            with self._files.open_output_stream(place) as sink:
                yield sink


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Turn whatever a file system's library raises into a StoreError, but for a file that is not there."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        told = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise StoreError(told) from error


def persistently(action: Callable[[], Found]) -> Found:
    """Do it and return what it returns; try again, with growing pauses, where the storage fails."""
    for pause in PAUSES_S:
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(pause)
    return action()


def together(action: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
    """Do it for each, several at once; return the answers in order, or raise the first error."""
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="raytx-storage") as pool:
        return list(pool.map(action, items))
