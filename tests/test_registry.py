"""The registry: whatever a plugin does wrong, the others work and the mistake is named."""

from __future__ import annotations

import types
from typing import Literal

import pytest

from raytx import hookimpl
from raytx.components import KINDS, DataConfig, StrategyConfig
from raytx.errors import PluginError
from raytx.registry import Registry, load, registry
from raytx.testing import FakeEntryPoint, fake_plugin, installed


class Rows(DataConfig):
    """Rows of nothing."""

    type: Literal["rows"] = "rows"


class Lockstep(StrategyConfig):
    """A strategy of nothing."""

    type: Literal["lockstep"] = "lockstep"


class Nameless(StrategyConfig):
    """A component that forgot its name."""


def module(name: str, **content: object) -> FakeEntryPoint:
    made = types.ModuleType(name)
    vars(made).update({"RAYTX_API": 1} | content)
    return FakeEntryPoint(name, made)


def reason(found: Registry, name: str) -> str:
    error = found.plugins[name].error
    assert error is not None, f"{name} was taken for sound"
    return error


def test_components_are_found_by_kind_and_type_with_their_owner() -> None:
    found = load([fake_plugin("one", Rows, Lockstep, version="2.1")])
    assert found.find("data", "rows") is Rows
    assert found.find("strategy", "lockstep") is Lockstep
    assert (found.owner(Rows()).name, found.owner(Rows()).version) == ("one", "2.1")
    assert found.broken == []


def test_two_providers_of_one_type_are_refused_naming_both() -> None:
    with pytest.raises(PluginError, match=r"'one' and 'two' both provide the data component 'rows'"):
        load([fake_plugin("two", Rows), fake_plugin("one", Rows)])


def test_only_the_wanted_plugins_are_loaded() -> None:
    found = load([fake_plugin("two", Rows), fake_plugin("one", Rows)], {"two"})
    assert list(found.plugins) == ["two"]


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (FakeEntryPoint("bad", ImportError("no module named 'gone'")), "ImportError: no module named 'gone'"),
        (FakeEntryPoint("bad", SyntaxError("invalid syntax")), "SyntaxError: invalid syntax"),
        (fake_plugin("bad", Rows, api=2), "written for plugin API 2; this raytx has 1"),
        (fake_plugin("bad", Rows, api=None), "written for plugin API None"),
        (module("bad"), "implements no hook"),
        (
            module("bad", raytx_modle=hookimpl(lambda: [])),
            "'raytx_modle' is no hook of raytx. Did you mean 'raytx_model'?",
        ),
        (module("bad", raytx_data=hookimpl(lambda surprise: [])), "surprise"),
        (module("bad", raytx_data=hookimpl(lambda: 1 / 0)), "ZeroDivisionError"),
        (module("bad", raytx_data=hookimpl(lambda: [Lockstep])), "which is no DataConfig class"),
        (module("bad", raytx_data=hookimpl(lambda: [Rows()])), "which is no DataConfig class"),
        (module("bad", raytx_strategy=hookimpl(lambda: [Nameless])), "Nameless has no name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_plugin_is_listed_with_its_reason_and_the_others_work(broken: FakeEntryPoint, why: str) -> None:
    found = load([broken, fake_plugin("good", Lockstep)])
    assert why in reason(found, "bad")
    assert [plugin.name for plugin in found.broken] == ["bad"]
    assert found.components["strategy"] == {"lockstep": Lockstep}
    assert found.components["data"] == {}


def test_an_unknown_type_names_the_nearest_and_the_broken_plugins() -> None:
    found = load([FakeEntryPoint("bad", ImportError("gone")), fake_plugin("good", Lockstep)])
    with pytest.raises(PluginError) as caught:
        found.find("strategy", "lokstep")
    assert "Did you mean 'lockstep'?" in str(caught.value)
    assert "Plugin 'bad' could not be loaded: ImportError: gone" in str(caught.value)


def test_autoload_can_be_turned_off_for_all_but_named_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYTX_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("RAYTX_PLUGINS", "good")
    with installed(fake_plugin("good", Lockstep), fake_plugin("other", Rows)) as found:
        assert list(found.plugins) == ["good"]


def test_what_is_installed_is_sound_and_covers_every_kind() -> None:
    assert registry().broken == []
    assert all(registry().components[kind] for kind in KINDS)
