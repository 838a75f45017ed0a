"""The schema: examples fit it, mistakes do not, and strangers' components are in it like ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
from pydantic import Field

from raytx import recipe
from raytx.components import KINDS, DataConfig
from raytx.errors import PluginError
from raytx.recipe import apply, parse
from raytx.registry import registry
from raytx.schema import catalogue, describe, schema
from raytx.sections import Section
from raytx.testing import FakeEntryPoint, fake_plugin, installed, tiny_recipe

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(
    path
    for path in ROOT.glob("examples/**/*.yaml")
    if "model:" in path.read_text() and not {"plugin", "kubernetes"} & set(path.parts)
)


class Split(Section):
    """What is held out."""

    test: float = Field(0.1, ge=0, lt=1)
    """Share of the rows."""


class Telegrams(DataConfig):
    """Telegrams from a stranger's archive.

    They are short.
    """

    type: Literal["telegrams"] = "telegrams"
    path: str
    """Where they lie."""
    limit: int | None = Field(None, gt=0)
    """How many at most;
    null takes all."""
    order: Literal["date", "place"] = "date"
    """Sort by this."""
    split: Split = Split()


@pytest.fixture
def stranger() -> Iterator[None]:
    with installed(fake_plugin("archive", Telegrams, version="3.2")):
        yield


def validator() -> Any:
    whole = schema()
    jsonschema.Draft202012Validator.check_schema(whole)
    return jsonschema.Draft202012Validator(whole)


def test_the_schema_is_one_itself_and_takes_a_dumped_recipe() -> None:
    validator().validate(tiny_recipe().dump())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_fits_the_schema_and_parses(path: Path) -> None:
    data = recipe.read(path)
    validator().validate(data)
    parse(data, where=str(path))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("trian", {}),
        ("optim.lr", "fast"),
        ("optim.lr", -1),
        ("train.precision", "fp8"),
        ("strategy.type", "dpp"),
        ("strategy.bucket_cap", 3),
        ("model.hidden_size", 0),
        ("model.type", None),
        ("export", [{"type": "hf", "opset": 18}]),
        ("export", {"type": "hf"}),
    ],
)
def test_a_mistake_does_not_fit_the_schema(path: str, value: Any) -> None:
    plain = tiny_recipe().dump()
    assert validator().is_valid(plain)
    assert not validator().is_valid(apply(plain, {path: value}))


def test_a_component_without_type_does_not_fit() -> None:
    plain = tiny_recipe().dump()
    del plain["data"]["type"]
    assert not validator().is_valid(plain)


def test_every_installed_component_is_an_alternative_of_its_kind() -> None:
    whole = schema()
    for kind in KINDS:
        place = whole["properties"][kind]
        choice = place["items"] if kind in ("compression", "export") else place
        types = {
            whole["$defs"][c["$ref"].removeprefix("#/$defs/")]["properties"]["type"]["const"] for c in choice["oneOf"]
        }
        assert types == set(registry().components[kind])


@pytest.mark.usefixtures("stranger")
def test_a_strangers_component_completes_like_ours() -> None:
    fitting = tiny_recipe().dump() | {"data": {"type": "telegrams", "path": "x", "split": {"test": 0.5}}}
    assert validator().is_valid(fitting)
    assert not validator().is_valid(apply(fitting, {"data.limit": 0}))
    assert not validator().is_valid(apply(fitting, {"data.split.train": 0.5}))
    assert schema()["$defs"]["data.telegrams"]["properties"]["path"]["description"] == "Where they lie."


@pytest.mark.usefixtures("stranger")
def test_a_component_is_described_with_its_fields() -> None:
    found = describe("data", "telegrams")
    assert (found["summary"], found["plugin"], found["version"]) == (
        "Telegrams from a stranger's archive.",
        "archive",
        "3.2",
    )
    assert found["description"].endswith("They are short.")
    fields = {field["name"]: field for field in found["fields"]}
    assert list(fields) == ["path", "limit", "order", "split"]
    assert fields["path"] == {
        "name": "path",
        "type": "text",
        "required": True,
        "default": None,
        "description": "Where they lie.",
    }
    assert (fields["limit"]["type"], fields["limit"]["default"]) == ("integer > 0 or null", None)
    assert fields["limit"]["description"] == "How many at most; null takes all."
    assert fields["order"]["type"] == "'date' or 'place'"
    assert fields["split"]["type"] == "{test: number >= 0 < 1}"
    assert fields["split"]["default"] == {"test": 0.1}


def test_an_unknown_kind_or_type_is_refused_with_the_nearest() -> None:
    with pytest.raises(PluginError, match=r"no kind 'strateg'. Did you mean 'strategy'\?"):
        describe("strateg", "ddp")
    with pytest.raises(PluginError, match=r"Did you mean 'deepspeed'\?"):
        describe("strategy", "deepsped")


def test_the_catalogue_lists_every_component_by_kind_with_a_summary() -> None:
    listed = catalogue()
    for kind in KINDS:
        entries = listed["components"][kind]
        assert [entry["type"] for entry in entries] == sorted(registry().components[kind])
        assert all(entry["summary"] and entry["plugin"] and entry["version"] for entry in entries)
    assert listed["broken"] == []


def test_the_catalogue_lists_broken_plugins_with_their_reason() -> None:
    with installed(FakeEntryPoint("lost", ImportError("no module named 'gone'"), version="0.3")):
        listed = catalogue()
    reason = "ImportError: no module named 'gone'"
    assert listed["broken"] == [{"name": "lost", "distribution": "lost", "version": "0.3", "error": reason}]
    assert listed["components"]["strategy"], "the others are still there"


@pytest.mark.parametrize(("kind", "type_"), [(k, t) for k in KINDS for t in registry().components[k]])
def test_every_installed_component_can_be_described(kind: str, type_: str) -> None:
    found = describe(kind, type_)
    assert found["summary"].endswith(".")
    assert all(field["type"] for field in found["fields"])
