"""Text files of a directory as rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytx.errors import DataError
from raytx.registry import registry


def _source(**fields: Any) -> Any:
    return registry().parse("data", {"type": "text-files", **fields}).build()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """200 small text files in two directories."""
    for index in range(200):
        path = tmp_path / f"d{index % 2}" / f"{index}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text {index}\n")
    return tmp_path


def _names(source: Any, split: str) -> list[str]:
    return [row["path"] for row in source.rows(split)]


def test_every_file_is_in_exactly_one_split_and_the_order_is_fixed(library: Path) -> None:
    source = _source(path=str(library), split={"test": 0.2})
    train, test = _names(source, "train"), _names(source, "test")
    assert sorted(train + test) == sorted(f"d{i % 2}/{i}.txt" for i in range(200))
    assert 20 < len(test) < 60
    assert _names(_source(path=str(library), split={"test": 0.2}), "train") == train
    assert train != sorted(train)


def test_another_file_moves_none_across_the_split(library: Path) -> None:
    before = set(_names(_source(path=str(library)), "test"))
    (library / "new.txt").write_text("new")
    assert set(_names(_source(path=str(library)), "test")) - {"new.txt"} == before


def test_rows_hold_the_text_and_the_relative_path(library: Path) -> None:
    row = next(_source(path=str(library)).rows("train"))
    assert row["text"] == (library / row["path"]).read_text()


def test_a_limit_of_bytes_takes_a_prefix_of_the_order_from_all_directories(library: Path) -> None:
    options = {"path": str(library), "split": {"test": 0}}
    everything = _names(_source(**options), "train")
    some = _names(_source(**options, max_bytes=400), "train")
    assert some == everything[: len(some)]
    assert 350 < sum((library / name).stat().st_size for name in some) <= 400
    assert {name[:2] for name in some} == {"d0", "d1"}


def test_a_single_file_is_a_source(library: Path) -> None:
    rows = list(_source(path=str(library / "d0" / "0.txt"), split={"test": 0}).rows("train"))
    assert rows == [{"text": "text 0\n", "path": "0.txt"}]


def test_excluded_paths_are_left_out(library: Path) -> None:
    assert all(name.startswith("d1/") for name in _names(_source(path=str(library), exclude=["d0/*"]), "train"))


def test_files_that_are_not_utf8_are_skipped_and_counted(library: Path) -> None:
    (library / "latin.txt").write_bytes("café".encode("latin-1"))
    source = _source(path=str(library))
    names = _names(source, "train") + _names(source, "test")
    assert "latin.txt" not in names
    assert source.remarks() == ["1 of 201 files are not UTF-8 text and were skipped, latin.txt for one"]


def test_the_fingerprint_follows_names_contents_and_split(library: Path) -> None:
    first = _source(path=str(library)).fingerprint()
    assert _source(path=str(library)).fingerprint() == first
    assert _source(path=str(library), split={"test": 0.3}).fingerprint() != first
    (library / "d0" / "0.txt").write_text("Text 0\n")
    changed = _source(path=str(library)).fingerprint()
    (library / "d0" / "0.txt").rename(library / "d0" / "zero.txt")
    assert len({first, changed, _source(path=str(library)).fingerprint()}) == 3


def test_no_file_found_is_an_error_that_says_where_and_what(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file matches pattern='\*\*/\*\.txt' below"):
        list(_source(path=str(tmp_path)).rows("train"))


def test_a_limit_below_the_first_file_is_an_error(library: Path) -> None:
    with pytest.raises(DataError, match=r"max_bytes=1 is less than"):
        list(_source(path=str(library), max_bytes=1).rows("train"))


def test_stdlib_is_this_pythons_modules_without_tests_and_packages() -> None:
    source = _source(path="stdlib")
    names = _names(source, "train") + _names(source, "test")
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any("site-packages" in name or "/test/" in f"/{name}" or "/tests/" in name for name in names)
    assert all(name.endswith(".py") for name in names)
    assert list(registry().parse("data", {"type": "text-files"}).local_files()) == []
