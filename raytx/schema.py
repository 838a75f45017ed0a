"""The schema: what a recipe may say, installed plugins included, for editors, `raytx schema` and `raytx plugins`."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from typing import Any

from raytx.components import KINDS, Component
from raytx.errors import PluginError, did_you_mean
from raytx.recipe import Recipe
from raytx.registry import registry

DIALECT = "https://json-schema.org/draft/2020-12/schema"
MANY = ("compression", "export")
"""The kinds of which a recipe holds a list."""
BASES = ("ModelConfig", "DataConfig", "StrategyConfig", "CompressionConfig", "ExportConfig")
"""The classes that stand in Recipe for whatever is installed."""


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe (draft 2020-12), with every installed component's fields."""
    whole = Recipe.model_json_schema()
    definitions = {name: section for name, section in whole["$defs"].items() if name not in BASES}
    for kind in KINDS:
        one_of, defined = _alternatives(kind)
        definitions |= defined
        place = whole["properties"][kind]
        described = {key: place[key] for key in ("title", "description", "default") if key in place}
        whole["properties"][kind] = described | ({"type": "array", "items": one_of} if kind in MANY else one_of)
    return {"$schema": DIALECT, **whole, "title": "A raytx recipe", "$defs": definitions}


def _alternatives(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the choice between a kind's components, and the definitions it refers to."""
    found = registry().components[kind]
    definitions: dict[str, Any] = {}
    for type_, config in found.items():
        definitions |= _definitions(f"{kind}.{type_}", config)
    choice = {
        "type": "object",
        "required": ["type"],
        "discriminator": {"propertyName": "type"},
        "oneOf": [{"$ref": f"#/$defs/{kind}.{type_}"} for type_ in found],
    }
    return choice, definitions


def _definitions(name: str, config: type[Component]) -> dict[str, Any]:
    """Return a component's definitions, all below its own name: two plugins may both have a class `Split`."""
    whole = config.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
    inner = whole.pop("$defs", {})
    whole["required"] = ["type", *(key for key in whole.get("required", []) if key != "type")]
    whole["description"] = inspect.cleandoc(config.__doc__ or "")
    return {name: whole} | {f"{name}.{key}": value for key, value in inner.items()}


def catalogue() -> dict[str, Any]:
    """Return what `raytx plugins` prints: "components" by kind, and "broken", the plugins that could not be loaded."""
    found = registry().components
    listed = {kind: [_headline(kind, config) for _, config in sorted(found[kind].items())] for kind in KINDS}
    return {"components": listed, "broken": [asdict(plugin) for plugin in registry().broken]}


def describe(kind: str, type_: str) -> dict[str, Any]:
    """Return one component: its headline, whole description and fields; raise PluginError naming the nearest."""
    if kind not in KINDS:
        raise PluginError(f"no kind {kind!r}.{did_you_mean(kind, KINDS)} Allowed: {', '.join(KINDS)}")
    config = registry().find(kind, type_)
    whole = config.model_json_schema()
    fields = [_field(key, value, whole) for key, value in whole["properties"].items() if key != "type"]
    return _headline(kind, config) | {"description": inspect.cleandoc(config.__doc__ or ""), "fields": fields}


def _headline(kind: str, config: type[Component]) -> dict[str, Any]:
    type_ = config.model_fields["type"].default
    plugin = registry().plugins[registry().owners[kind, type_]]
    return {
        "kind": kind,
        "type": type_,
        "summary": inspect.cleandoc(config.__doc__ or "").partition("\n")[0],
        "plugin": plugin.name,
        "version": plugin.version,
    }


def _field(name: str, value: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    required = name in whole.get("required", ())
    return {
        "name": name,
        "type": _type(value, whole.get("$defs", {})),
        "required": required,
        "default": None if required else value.get("default"),
        "description": " ".join(value.get("description", "").split()),
    }


def _type(value: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return a field's type in words: "integer > 0", "'fp32' or 'bf16'", "list of text"."""
    if "$ref" in value:
        return _type(definitions[value["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_type(choice, definitions) for choice in value["anyOf"]))
    if "enum" in value:
        return " or ".join(repr(choice) for choice in value["enum"])
    if "const" in value:
        return repr(value["const"])
    if value.get("type") == "array":
        inner = value.get("items") or {"anyOf": value.get("prefixItems", [])}
        return f"list of {_type(inner, definitions)}" if inner.get("anyOf") != [] else "list"
    if value.get("type") == "object":
        return _mapping(value, definitions)
    words = {"string": "text", "null": "null", "boolean": "true or false", None: "anything"}
    return words.get(value.get("type"), str(value.get("type"))) + _bounds(value)


def _mapping(value: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "properties" in value:
        return "{" + ", ".join(f"{key}: {_type(v, definitions)}" for key, v in value["properties"].items()) + "}"
    values = value.get("additionalProperties")
    return f"mapping to {_type(values, definitions)}" if isinstance(values, dict) and values else "mapping"


def _bounds(value: dict[str, Any]) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    return "".join(f" {sign} {value[key]:g}" for key, sign in signs.items() if key in value)
