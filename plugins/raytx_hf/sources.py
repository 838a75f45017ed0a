"""Rows from data files and from the hub's datasets, as data components."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from raytx.components import DataConfig, Source
from raytx.sections import Section

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
}
"""Format by file name ending."""
Value = str | int | float | bool | None


class Split(Section):
    """What is held out."""

    test: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the rows held out."""
    seed: int = 0
    """Which rows these are."""
    stratify: bool | str = False
    """Keep each value's share in both splits: of the label column, or of the one named."""

    @property
    def stratify_by(self) -> str | None:
        return "label" if self.stratify is True else self.stratify or None


class Rows(DataConfig):
    """What files and hub datasets have in common."""

    columns: dict[str, str] = {}
    """What the task calls a column: what the file calls it. {text: review, label: label}; others are dropped. Without
    it, rows keep all columns under their own names."""
    filter: dict[str, Value | list[Value]] = {}
    """Keep rows whose column has this value, or one of these: {language: [en, de]}. Columns by the file's names."""
    select: str | Annotated[int, Field(gt=0)] | None = None
    """Of the rows that pass the filter: a slice such as "10:100", or a number, drawn at random but always the same."""
    split: Split | None = None
    """Hold out a share of the rows."""

    @field_validator("select")
    @classmethod
    def _slice(cls, select: str | int | None) -> str | int | None:
        if isinstance(select, str):
            as_slice(select)
        return select


class Files(Rows):
    """Rows of CSV, TSV, JSON, JSON lines or Parquet files."""

    type: Literal["files"] = "files"
    path: str | tuple[str, ...]
    """A file, or several with the same columns."""
    format: Literal["csv", "tsv", "json", "parquet"] | None = None
    """How the files are written; null goes by their names. json also reads JSON lines."""
    test_path: str | tuple[str, ...] | None = None
    """Files that are the held-out split, instead of a share of the rows."""

    @model_validator(mode="after")
    def _known_format(self) -> Files:
        for path in (*self.paths("train"), *self.paths("test")):
            if self.format is None and Path(path).suffix.lower() not in FORMATS:
                raise ValueError(f"{path}: the name does not tell the format; give format: csv, tsv, json or parquet")
        if self.split is not None and self.test_path is not None:
            raise ValueError("give split (a share held out) or test_path (files held out), not both")
        return self

    def paths(self, split: Literal["train", "test"]) -> tuple[str, ...]:
        paths = self.path if split == "train" else self.test_path or ()
        return (paths,) if isinstance(paths, str) else paths

    def format_of(self, path: str) -> str:
        return self.format or FORMATS[Path(path).suffix.lower()]

    def local_files(self) -> Iterable[tuple[str, str]]:
        yield from (("path", path) for path in self.paths("train"))
        yield from (("test_path", path) for path in self.paths("test"))

    def build(self) -> Source:
        from raytx_hf.tables import FilesSource

        return FilesSource(self)


class Hub(Rows):
    """Rows of a Hugging Face dataset, by hub name or directory."""

    type: Literal["datasets"] = "datasets"
    name: str
    """Hub name (owner/name) or directory. A dataset that brings code to run is refused."""
    config: str | None = None
    """Configuration of the dataset, where it has several."""
    revision: str | None = None
    """Commit, branch or tag."""
    train_split: str = "train"
    """The dataset's split to train on."""
    test_split: str | None = None
    """The dataset's split to measure on, instead of a share of the training rows."""

    @model_validator(mode="after")
    def _one_held_out(self) -> Hub:
        if self.split is not None and self.test_split is not None:
            raise ValueError("give split (a share held out) or test_split (one of the dataset's own), not both")
        return self

    def build(self) -> Source:
        from raytx_hf.tables import HubSource

        return HubSource(self)


def as_slice(text: str) -> slice:
    """Read "10:100", ":100" or "10:"; raise ValueError for anything else."""
    start, colon, stop = text.partition(":")
    if not colon or not all(part.isdigit() or not part for part in (start, stop)):
        raise ValueError('must be a number of rows or a slice such as "10:100"')
    return slice(int(start) if start else None, int(stop) if stop else None)
