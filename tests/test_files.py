"""Files: whole or absent, and every change of a byte is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytx.files import digest, disagreements, inventory, read_json, write_json, write_text


def test_text_is_written_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "one")
    write_text(tmp_path / "a.txt", "zwei\u2026")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "zwei\u2026"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["a.txt"]


def test_json_comes_back_as_it_went(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": "ü"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert list(json.loads((tmp_path / "a.json").read_text())) == ["b", "a"], "order is kept"


def test_a_digest_depends_on_values_and_not_on_their_order() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_an_untouched_directory_agrees_with_its_inventory(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x").write_bytes(b"abc")
    (tmp_path / "y").write_bytes(b"")
    (tmp_path / "manifest").write_bytes(b"...")
    files = inventory(tmp_path, exclude=frozenset({"manifest"}))
    assert set(files) == {"sub/x", "y"}
    assert files["sub/x"]["bytes"] == 3
    assert disagreements(tmp_path, files, manifest="manifest") == []


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(b"abcd"), "4 bytes, the manifest says 3"),
        (lambda path: path.write_bytes(b"abd"), "SHA-256 differs"),
    ],
)
def test_a_lost_longer_or_changed_file_is_named(tmp_path: Path, damage: object, told: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    files = inventory(tmp_path)
    damage(path)  # type: ignore[operator]
    (found,) = disagreements(tmp_path, files, manifest="manifest.json")
    assert found.startswith("x: ")
    assert told in found
