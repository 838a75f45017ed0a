"""Load plugins, collect their components, find one by kind and type."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib import metadata
from types import ModuleType
from typing import Any

import pluggy
from pydantic_core import PydanticCustomError

from raytx import hookspecs
from raytx.components import KINDS, Component
from raytx.errors import PluginError, did_you_mean

GROUP = "raytx"


@dataclass(frozen=True)
class Plugin:
    """An installed plugin: what the entry point says, and why it could not be loaded if it could not."""

    name: str
    distribution: str
    version: str
    error: str | None = None


@dataclass(frozen=True)
class Registry:
    """The loaded plugins and their components."""

    plugins: dict[str, Plugin] = field(default_factory=dict)
    components: dict[str, dict[str, type[Component]]] = field(default_factory=dict)
    owners: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def broken(self) -> list[Plugin]:
        return [plugin for plugin in self.plugins.values() if plugin.error]

    def find(self, kind: str, type_: str) -> type[Component]:
        """Return the config class of a component; raise PluginError with the nearest name and the broken plugins."""
        found = self.components[kind].get(type_)
        if found is None:
            raise PluginError(self.unknown(kind, type_))
        return found

    def unknown(self, kind: str, type_: Any) -> str:
        known = sorted(self.components[kind])
        broken = "".join(f" Plugin {p.name!r} could not be loaded: {p.error}." for p in self.broken)
        hint = did_you_mean(str(type_), known)
        return f"no {kind} component of type {type_!r}. Installed: {', '.join(known) or 'none'}.{hint}{broken}"

    def parse(self, kind: str, value: Any) -> Component:
        """Turn a recipe's mapping into its component. Made to be called by pydantic, which merges the errors raised."""
        if isinstance(value, Component):
            return value
        if not isinstance(value, dict):
            raise PydanticCustomError("component", "must be a mapping with a 'type', such as {type: ...}")
        if "type" not in value:
            known = ", ".join(sorted(self.components[kind]))
            raise PydanticCustomError("component", "has no 'type'; allowed: {known}", {"known": known})
        found = self.components[kind].get(value["type"]) if isinstance(value["type"], str) else None
        if found is None:
            message = self.unknown(kind, value["type"])
            raise PydanticCustomError("component_type", "{message}", {"message": message})
        return found.model_validate(value)

    def owner(self, component: Component) -> Plugin:
        """Return the plugin that provides a component."""
        return self.plugins[self.owners[component.kind, component.type]]


@functools.cache
def registry() -> Registry:
    """Return the registry of everything installed; loaded once a process.

    RAYTX_DISABLE_PLUGIN_AUTOLOAD=1 loads only the plugins named in RAYTX_PLUGINS (comma separated).
    """
    if os.environ.get("RAYTX_DISABLE_PLUGIN_AUTOLOAD") == "1":
        wanted: set[str] | None = set(filter(None, os.environ.get("RAYTX_PLUGINS", "").split(",")))
    else:
        wanted = None
    return load(metadata.entry_points(group=GROUP), wanted)


def load(entry_points: Iterable[metadata.EntryPoint], wanted: set[str] | None = None) -> Registry:
    """Load plugins from entry points (only the wanted ones, where given) and collect their components.

    A plugin that fails to import, implements no known hook or misspells one, or was written for another API version,
    is listed as broken. Two plugins of one kind and type are an error that names both.
    """
    manager = pluggy.PluginManager("raytx")
    manager.add_hookspecs(hookspecs)
    plugins: dict[str, Plugin] = {}
    for entry_point in sorted(entry_points, key=lambda e: e.name):
        if wanted is not None and entry_point.name not in wanted:
            continue
        error = _register(manager, entry_point)
        distribution = entry_point.dist
        plugins[entry_point.name] = Plugin(
            name=entry_point.name,
            distribution=distribution.name if distribution else "?",
            version=distribution.version if distribution else "?",
            error=error,
        )
    return _collect(manager, plugins)


def _register(manager: pluggy.PluginManager, entry_point: metadata.EntryPoint) -> str | None:
    """Import one plugin and register it; return why it is broken, or None."""
    try:
        module: ModuleType = entry_point.load()
    except Exception as error:  # a plugin may fail in any way; none may take the others down
        return f"{type(error).__name__}: {error}"
    api = getattr(module, "RAYTX_API", None)
    if api != hookspecs.API_VERSION:
        return f"it was written for plugin API {api!r}; this raytx has {hookspecs.API_VERSION} (set RAYTX_API)"
    known = {f"raytx_{kind}" for kind in KINDS}
    marked = [name for name, value in vars(module).items() if getattr(value, "raytx_impl", None) is not None]
    for name in marked:
        if name not in known:
            return f"{name!r} is no hook of raytx.{did_you_mean(name, known)}"
    if not marked:
        return f"it implements no hook; mark one of {', '.join(sorted(known))} with @raytx.hookimpl"
    try:
        manager.register(module, name=entry_point.name)
    except pluggy.PluginValidationError as error:
        return " ".join(str(error).split())
    return None


def _collect(manager: pluggy.PluginManager, plugins: dict[str, Plugin]) -> Registry:
    found = Registry(plugins=plugins, components={kind: {} for kind in KINDS})
    for name, module in manager.list_name_plugin():
        try:
            provided = [(kind, config) for kind in KINDS for config in _provided(module, kind)]
        except Exception as error:  # as in _register
            plugins[name] = replace(plugins[name], error=f"{type(error).__name__}: {error}")
            continue
        for kind, config in provided:
            _add(found, kind, config, owner=name)
    return found


def _provided(module: Any, kind: str) -> list[type[Component]]:
    """Return the components of a kind that a plugin's hook gives; raise TypeError when it gives something else."""
    hook = getattr(module, f"raytx_{kind}", None)
    configs = list(hook()) if hook is not None else []
    for config in configs:
        if not (isinstance(config, type) and issubclass(config, Component) and config.kind == kind):
            raise TypeError(f"raytx_{kind} returned {config!r}, which is no {kind.capitalize()}Config class")
        if not isinstance(config.model_fields["type"].default, str):
            raise TypeError(f'{config.__name__} has no name; declare `type: Literal["name"] = "name"`')
    return configs


def _add(registry: Registry, kind: str, config: type[Component], *, owner: str) -> None:
    type_ = config.model_fields["type"].default
    if (other := registry.owners.get((kind, type_))) is not None:
        raise PluginError(
            f"plugins {other!r} and {owner!r} both provide the {kind} component {type_!r}; uninstall one of them, or "
            "load only the ones you want with RAYTX_DISABLE_PLUGIN_AUTOLOAD=1 and RAYTX_PLUGINS=name,name"
        )
    registry.components[kind][type_] = config
    registry.owners[kind, type_] = owner
