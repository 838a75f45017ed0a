"""Tensors become files of bounded size that safetensors reads; targets are free or refused."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from raytx import cli
from raytx.components import TensorGroup, TensorHeader
from raytx.consolidate import _free, _staged, _verify, _write, arranged, prologue, shard_bytes
from raytx.errors import ArtifactError, RecipeError

SPELLED = {"float32": "F32", "int64": "I64", "uint8": "U8", "bool": "BOOL", "uint16": "BF16"}
NUMBERS = {
    "scalar": np.float32(3.5).reshape(()),
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "none": np.zeros((0, 4), np.float32),
    "whole": np.array([2**62, -1]),
    "flags": np.array([True, False, True]),
}


def grouped(arrays, *, together=1):
    """Return arrays as groups of so many tensors."""
    items = list(arrays.items())
    for first in range(0, len(items), together):
        part = dict(items[first : first + together])
        headers = {name: TensorHeader(SPELLED[str(array.dtype)], array.shape) for name, array in part.items()}
        yield TensorGroup(headers, lambda part=part: iter(part.items()))


def written(directory, groups, **options):
    groups = list(groups)
    shards = arranged(groups, **options)
    return shards, _write(directory, shards, groups, lambda done, of: None)


@pytest.mark.parametrize("together", [1, 2, 5])
def test_safetensors_reads_what_was_written(tmp_path, together):
    shards, hashes = written(tmp_path, grouped(NUMBERS, together=together), stem="model")
    _verify(tmp_path, shards, hashes)
    assert list(shards) == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == NUMBERS.keys()
    for name, value in NUMBERS.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name, strict=True)


def test_numbers_begin_at_a_multiple_of_eight_bytes_whatever_the_names_are():
    for length in range(1, 20):
        assert len(prologue({"n" * length: TensorHeader("F32", (1,))})) % 8 == 0


def test_files_say_that_torch_may_read_them(tmp_path):
    written(tmp_path, grouped(NUMBERS), stem="model")
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_files_are_filled_up_to_the_limit_in_order_and_a_larger_tensor_has_one_of_its_own():
    arrays = {name: np.zeros(size, np.float32) for name, size in zip("abcdef", (1, 1, 5, 1, 2, 1), strict=True)}
    shards = arranged(grouped(arrays, together=2), stem="model", limit=12)
    assert {name: list(held) for name, held in shards.items()} == {
        "model-00001-of-00004.safetensors": ["a", "b"],
        "model-00002-of-00004.safetensors": ["c"],
        "model-00003-of-00004.safetensors": ["d", "e"],
        "model-00004-of-00004.safetensors": ["f"],
    }


def test_each_group_is_made_once_and_not_before_those_ahead_of_it_are_written(tmp_path):
    order = []

    def group(name):
        def make():
            order.append(f"made {name}")
            yield name, np.zeros(4, np.float32)

        return TensorGroup({name: TensorHeader("F32", (4,))}, make)

    groups = [group("a"), group("b")]
    _write(tmp_path, arranged(groups), groups, lambda done, of: order.append(f"{done} of {of}"))
    assert order == ["made a", "16 of 32", "made b", "32 of 32"]


def test_several_files_have_an_index(tmp_path):
    shards, _ = written(tmp_path, grouped(NUMBERS), stem="model", limit=24)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: name for name, held in shards.items() for key in held}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in NUMBERS.values())


@pytest.mark.parametrize("array", [np.zeros((2, 3)), np.zeros((3, 2), np.float32)], ids=["type", "shape"])
def test_a_tensor_that_is_made_otherwise_than_announced_is_an_error(tmp_path, array):
    group = TensorGroup({"x": TensorHeader("F32", (2, 3))}, lambda: iter([("x", array)]))
    with pytest.raises(ArtifactError, match="x was made as"):
        written(tmp_path, [group])


@pytest.mark.parametrize("place", [20, -1], ids=["header", "numbers"])
def test_storage_that_changes_a_byte_is_found_out(tmp_path, place):
    shards, hashes = written(tmp_path, grouped({"x": np.zeros(3, np.float32)}))
    path = tmp_path / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="does not read back"):
        _verify(tmp_path, shards, hashes)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("50MB", 5 * 10**7), ("4096", 4096), ("1B", 1)]
)
def test_sizes_are_read_as_the_hub_reads_them(text, size):
    assert shard_bytes(text) == size


@pytest.mark.parametrize("text", ["", "five", "-1GB", "5TB5", "0", "0.1B", "GB"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(RecipeError, match="such as 5GB"):
        shard_bytes(text)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(RecipeError, match="is not empty"):
        _free(tmp_path / "full")
    with pytest.raises(RecipeError, match="is a file"):
        _free(tmp_path / "full" / "mine")


@pytest.mark.parametrize("exists", [True, False])
def test_a_directory_appears_complete(tmp_path, exists):
    target = tmp_path / "a" / "b"
    if exists:
        target.mkdir(parents=True)
    with _staged(_free(target)) as staging:
        (staging / "file").write_text("whole")
        assert not list(target.glob("*"))
    assert (target / "file").read_text() == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["b"]


def test_a_failure_leaves_nothing(tmp_path):
    def fail():
        with _staged(tmp_path / "out") as staging:
            (staging / "file").write_text("part")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("{tmp}/absent", "{tmp}/out"), "neither a run directory nor a checkpoint"),
        (("{tmp}/absent", "{tmp}/full"), "is not empty"),
        (("{tmp}/absent", "{tmp}/out", "--max-shard-size", "huge"), "'huge' is no size"),
        (("{tmp}/absent", "{tmp}/out", "--dtype", "int8"), "'int8' is not one of 'float32', 'bfloat16', 'float16'"),
    ],
)
def test_a_mistake_ends_with_one_message_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, told):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    command = ["raytx", "consolidate", *(argument.format(tmp=tmp_path) for argument in arguments)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
