"""Read files and hub datasets as tables: filter, select, split, and name columns as the task does."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import datasets
import numpy as np

from raytx.errors import DataError, did_you_mean
from raytx.files import digest, sha256
from raytx.tasks.base import Row
from raytx_hf.sources import as_slice

if TYPE_CHECKING:
    from raytx_hf.sources import Files, Hub, Rows

datasets.disable_progress_bars()  # they would break the host's own progress line

Table = datasets.Dataset
SplitName = Literal["train", "test"]


class TableSource:
    """Fulfils raytx.components.Source over one or two tables; subclasses say how these are read."""

    def __init__(self, config: Rows) -> None:
        self.config = config

    @property
    def where(self) -> str:
        """The recipe's words for what is read."""
        raise NotImplementedError

    def table(self, split: SplitName) -> Table | None:
        """Return the table a split has of its own, None for a test split without one."""
        raise NotImplementedError

    def contents(self) -> Any:
        """Return what names the bytes behind the tables, as JSON."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        return digest({"contents": self.contents(), "options": self.config.model_dump(mode="json")})

    def rows(self, split: SplitName) -> Iterator[Row]:
        table = self._splits[split]
        if table is None:
            return
        columns = self.config.columns or {column: column for column in table.column_names}
        names = {column: table.features[column].int2str for column in _class_columns(table)}
        for record in table.select_columns(list(dict.fromkeys(columns.values()))):
            yield {key: _named(record[column], names.get(column)) for key, column in columns.items()}

    def remarks(self) -> list[str]:
        return []

    @cached_property
    def _splits(self) -> dict[SplitName, Table | None]:
        train = self._chosen(self.table("train"))
        if self.config.split is None:
            test = self.table("test")
            return {"train": train, "test": None if test is None else self._filtered(test)}
        inside, outside = held_out(self._groups(train), share=self.config.split.test, seed=self.config.split.seed)
        if not inside or not outside:
            raise DataError(f"{self.where}: {self.config.split.test} of {len(train)} rows leaves one split empty")
        return {"train": train.select(inside), "test": train.select(outside)}

    def _chosen(self, table: Table | None) -> Table:
        """Apply filter and select to the training rows."""
        assert table is not None
        table = self._filtered(table)
        return table if self.config.select is None else table.select(selected(len(table), self.config.select))

    def _filtered(self, table: Table) -> Table:
        """Keep rows that match. 1 and "1" are the same value, since a CSV has only text."""
        for column in (*self.config.columns.values(), *self.config.filter):
            self._check_column(table, column)
        keep = np.ones(len(table), dtype=bool)
        for column, wanted in self.config.filter.items():
            allowed = {str(value) for value in (wanted if isinstance(wanted, list) else [wanted])}
            keep &= np.fromiter(
                (str(value) in allowed for value in _values(table, column)), dtype=bool, count=len(table)
            )
        return table if keep.all() else table.select(np.flatnonzero(keep))

    def _groups(self, table: Table) -> Sequence[Any]:
        """Return what each row is stratified by; one group where nothing is asked."""
        assert self.config.split is not None
        by = self.config.split.stratify_by
        if by is None:
            return [None] * len(table)
        column = self.config.columns.get(by, by)
        self._check_column(table, column)
        return _values(table, column)

    def _check_column(self, table: Table, column: str) -> None:
        if column not in table.column_names:
            raise DataError(
                f"{self.where}: no column {column!r}.{did_you_mean(column, table.column_names)} "
                f"Columns: {', '.join(table.column_names)}"
            )


class FilesSource(TableSource):
    """Data files, read by the datasets library into its memory-mapped cache."""

    config: Files

    def table(self, split: SplitName) -> Table | None:
        paths = self.config.paths(split)
        return datasets.concatenate_datasets([self._read(path) for path in paths]) if paths else None

    def contents(self) -> Any:
        return [[sha256(_local(path)) for path in self.config.paths(split)] for split in ("train", "test")]

    @property
    def where(self) -> str:
        return f"data.path={self.config.path if isinstance(self.config.path, str) else ', '.join(self.config.path)}"

    def _read(self, path: str) -> Table:
        format_ = self.config.format_of(path)
        options = _csv_options(_local(path), "\t" if format_ == "tsv" else ",") if format_ in {"csv", "tsv"} else {}
        builder = "csv" if format_ == "tsv" else format_
        try:
            return datasets.load_dataset(builder, data_files=str(_local(path)), split="train", **options)
        except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
            cause = " ".join(str(error.__cause__ or error).split())[:300]
            raise DataError(f"data.path={path}: not readable as {format_}: {cause}") from None


class HubSource(TableSource):
    """A dataset of the hub, or a directory in the layout of one."""

    config: Hub

    def table(self, split: SplitName) -> Table | None:
        wanted = self.config.train_split if split == "train" else self.config.test_split
        return None if wanted is None else self._load(wanted)

    def contents(self) -> Any:
        """The bytes of the Arrow files that the datasets library made of it."""
        tables = [table for split in ("train", "test") if (table := self.table(split)) is not None]
        return [[sha256(Path(file["filename"])) for file in table.cache_files] for table in tables]

    @property
    def where(self) -> str:
        return f"data.name={self.config.name}"

    def _load(self, split: str) -> Table:
        try:
            return datasets.load_dataset(
                str(Path(self.config.name).expanduser()) if self.config.name.startswith("~") else self.config.name,
                self.config.config,
                split=split,
                revision=self.config.revision,
            )
        except Exception as error:  # offline, not found, gated, no such split, a script: each with its own class
            raise DataError(f"{self.where}: {' '.join(str(error).split())[:400]}") from None


def held_out(groups: Sequence[Any], *, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split row indices into (kept, held out), each in order, taking the share out of every group.

    Groups get whole rows: each its share rounded down, and those with the largest remainders one more, until the total
    is the share of all rows.
    """
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(str(group), []).append(index)
    quotas = _quotas({name: len(rows) for name, rows in members.items()}, share)
    generator = np.random.default_rng(seed)
    outside = {int(i) for name in sorted(members) for i in generator.permutation(members[name])[: quotas[name]]}
    return [i for i in range(len(groups)) if i not in outside], sorted(outside)


def _quotas(sizes: dict[str, int], share: float) -> dict[str, int]:
    quotas = {name: int(size * share) for name, size in sizes.items()}
    short = round(sum(sizes.values()) * share) - sum(quotas.values())
    by_remainder = sorted(sizes, key=lambda name: (quotas[name] - sizes[name] * share, name))
    return quotas | {name: quotas[name] + 1 for name in by_remainder[: max(0, short)]}


def selected(length: int, select: str | int) -> list[int]:
    """Return the indices that `select` keeps of so many rows, in order."""
    if isinstance(select, str):
        return list(range(length)[as_slice(select)])
    drawn = np.random.default_rng(0).permutation(length)[:select]
    return sorted(int(index) for index in drawn)


def _values(table: Table, column: str) -> list[Any]:
    """Return a column as a list, classes by their names."""
    feature = table.features[column]
    name = feature.int2str if isinstance(feature, datasets.ClassLabel) else None
    return [_named(value, name) for value in table[column]]


def _class_columns(table: Table) -> list[str]:
    return [column for column, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]


def _named(value: Any, name: Callable[[int], str] | None) -> Any:
    """Return the name of a class; -1 stands for no label in hub datasets."""
    if name is None or value is None:
        return value
    return name(value) if value >= 0 else None


def _csv_options(path: Path, separator: str) -> dict[str, Any]:
    """Read every CSV value as text: a column's type must not depend on which rows a chunk holds, nor 01 become 1.

    Only an empty field is missing; the words NA and null are words.
    """
    features = datasets.Features({name: datasets.Value("string") for name in _csv_header(path, separator)})
    missing = {"keep_default_na": False, "na_values": [""]}
    return {"sep": separator, "features": features, "encoding": "utf-8-sig", "index_col": False, **missing}


def _csv_header(path: Path, separator: str) -> list[str]:
    """Return the column names. A first row wider than these would make pandas shift every column, or cut the row."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter=separator)
            header, first = next(lines, []), next(lines, [])
    except UnicodeDecodeError as error:
        raise DataError(f"data.path={path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except csv.Error as error:
        raise DataError(f"data.path={path}: not readable as csv: {error}") from None
    if not header:
        raise DataError(f"data.path={path}: the file is empty; its first line must name the columns")
    if len(set(header)) < len(header):
        raise DataError(f"data.path={path}: two columns have one name among {', '.join(header)}")
    if len(first) > len(header):
        raise DataError(
            f"data.path={path}: not readable as csv: the first row has {len(first)} fields, the header {len(header)}"
        )
    return header


def _local(path: str) -> Path:
    return Path(path).expanduser().absolute()
