"""The recipe: what to learn. Load it from YAML or Python, override it, dump it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from raytx import storage
from raytx.components import (
    Component,
    CompressionConfig,
    DataConfig,
    ExportConfig,
    ModelConfig,
    StrategyConfig,
)
from raytx.errors import RecipeError, did_you_mean
from raytx.registry import registry
from raytx.sections import Evaluate, Optim, Save, Scaling, Search, Section, Serving, Train

MAX_NODES = 100_000
"""Values a recipe may expand to. A few lines of YAML aliases can stand for millions."""

NOT_SHOWN = "not_shown"
"""Type of a mistake whose message does not show the value: it may hold a secret."""
PLAIN = {
    **dict.fromkeys(("model_type", "dict_type", "mapping_type"), "must be a mapping of keys to values"),
    **dict.fromkeys(("tuple_type", "list_type"), "must be a list"),
}
"""What pydantic says in the words of Python, in those of YAML."""


def _component(kind: str) -> BeforeValidator:
    return BeforeValidator(lambda value: _with_homes(registry().parse(kind, value)))


def _with_homes(component: Component) -> Component:
    for key, path in component.local_files():
        if (problem := _homeless(path)) is not None:
            raise ValueError(f"{key}={path}: {problem}")
    return component


def _homeless(path: str) -> str | None:
    """Return what is wrong with a path that begins in a home directory which nobody knows, or None."""
    try:
        Path(path).expanduser()
    except RuntimeError:
        return f"the home directory {path.partition('/')[0]!r} is not known on this machine; write the path out"
    return None


class Recipe(Section):
    """Everything a run is made of. A recipe in YAML and the same in Python are equal values."""

    name: str = Field(min_length=1, max_length=100)
    """Names the run and its directory. Training a name again goes on where it was."""
    storage_path: str = "~/raytx-runs"
    """Where runs live: a directory, on several nodes one that all of them share, or a URI such as s3://bucket/path of
    any file system that pyarrow or fsspec knows. With a URI nodes share nothing but it, and work in local caches."""
    model: Annotated[SerializeAsAny[ModelConfig], _component("model")]
    """The model and its task."""
    data: Annotated[SerializeAsAny[DataConfig], _component("data")]
    """The source of rows."""
    strategy: Annotated[SerializeAsAny[StrategyConfig], _component("strategy")] = Field(default={"type": "ddp"})  # type: ignore[assignment]
    """How a step spreads over the ranks."""
    optim: Optim = Optim()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    save: Save = Save()
    compression: tuple[Annotated[SerializeAsAny[CompressionConfig], _component("compression")], ...] = ()
    """Steps that make the trained model smaller, in order."""
    export: tuple[Annotated[SerializeAsAny[ExportConfig], _component("export")], ...] = ()
    """Public formats written at the end of training."""
    scaling: Scaling = Scaling()
    search: Search | None = None
    serving: Serving = Serving()

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError("must be letters, digits, '.', '_' and '-', beginning with a letter or digit")
        return name

    @field_validator("storage_path")
    @classmethod
    def _usable(cls, path: str) -> str:
        if storage.is_uri(path) and (problem := storage.refusal(path)) is not None:
            raise PydanticCustomError(NOT_SHOWN, "{problem}", {"problem": problem})
        if not storage.is_uri(path) and (problem := _homeless(path)) is not None:
            raise ValueError(problem)
        return path

    def components(self) -> Iterator[Component]:
        """Yield every component of the recipe, in the order in which a run meets them."""
        yield from (self.model, self.data, self.strategy, *self.compression, *self.export)

    def dump(self) -> dict[str, Any]:
        """Return the recipe as plain data, defaults included."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the recipe as YAML that loads to an equal recipe; values left at their default are left out."""
        return yaml.dump(self._set_values(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)

    def _set_values(self) -> dict[str, Any]:
        plain: dict[str, Any] = self.model_dump(mode="json", exclude_defaults=True)
        for name in ("model", "data", "strategy"):
            _keep_type(plain, name, getattr(self, name))
        for name in ("compression", "export"):
            for place, component in enumerate(getattr(self, name)):
                plain[name][place] = {"type": component.type, **plain[name][place]}
        return plain

    def override(self, values: Mapping[str, Any]) -> Recipe:
        """Return a recipe with dotted paths replaced; raise RecipeError for unknown ones."""
        return parse(apply(self._set_values(), values), where="override")


def _keep_type(plain: dict[str, Any], name: str, component: Component) -> None:
    """A component's type is its field default, so exclude_defaults drops it; it is what names the component."""
    if name in plain:
        plain[name] = {"type": component.type, **plain[name]}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML, with overrides such as "optim.lr=1e-4"; raise RecipeError with every mistake at once."""
    return parse(apply(read(path), parse_overrides(overrides)), where=str(path))


def read(path: str | Path) -> dict[str, Any]:
    """Return a recipe file's plain data."""
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file. `raytx init` writes a starter recipe")
    try:
        text = path.read_text(encoding="utf-8")
        data = _yaml(text)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    _bound(data, str(path))
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, this is {_kind_of(data)}")
    return data


def parse(data: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Validate plain data into a recipe; raise RecipeError with every mistake, its path and the nearest name."""
    try:
        return Recipe.model_validate(_copy(data))
    except ValidationError as error:
        raise RecipeError(explain(error, where=where, data=data)) from None


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn "key.path=value" arguments into {path: value}; values are YAML."""
    values = {}
    for text in overrides:
        path, separator, value = text.partition("=")
        if not separator or not path.strip():
            raise RecipeError(f"override {text!r}: must be key.path=value, for example optim.lr=1e-4")
        try:
            values[path.strip()] = _yaml(value)
        except yaml.YAMLError as error:
            raise RecipeError(
                f"override {text!r}: the value is not valid YAML: {' '.join(str(error).split())}"
            ) from None
        _bound(values[path.strip()], f"override {path.strip()}")
    return values


def apply(data: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain data with dotted paths set; list items are addressed by index (export.0.opset).

    A component's type is set before its fields, in whatever order they are given.
    """
    result: dict[str, Any] = _copy(data)
    for path, value in sorted(values.items(), key=lambda item: not item[0].endswith(".type")):
        *parents, last = path.split(".")
        place: Any = result
        for depth, key in enumerate(parents):
            place = _enter(place, key, ".".join(parents[: depth + 1]))
        if isinstance(place, list):
            _enter(place, last, path)
            place[int(last)] = value
        elif last == "type" and isinstance(place, dict) and place.get("type") not in (None, value):
            place.clear()  # another component has other fields
            place["type"] = value
        else:
            place[last] = value
    return result


def _enter(place: Any, key: str, path: str) -> Any:
    if isinstance(place, list):
        if not key.isdigit() or int(key) >= len(place):
            raise RecipeError(f"override {path}: the list has {len(place)} items; use an index below that")
        return place[int(key)]
    inner = place.setdefault(key, {})
    if inner is None:
        inner = place[key] = {}
    if not isinstance(inner, dict | list):
        raise RecipeError(f"override {path}: {path} is a value ({inner!r}), not a section")
    return inner


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list | tuple) else value


class _Loader(yaml.SafeLoader):
    """Plain YAML in which a key stands once, and 2e-5 is a number as in YAML 1.2 (1.1 wants 2.0e-5)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise yaml.YAMLError(f"key {key!r} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that _Loader would read as numbers."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def _yaml(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def _bound(data: Any, where: str) -> None:
    """Refuse YAML whose aliases expand to more than anybody wrote."""
    pending, seen = [data], 0
    while pending:
        value = pending.pop()
        seen += 1
        if seen > MAX_NODES:
            raise RecipeError(f"{where}: expands to more than {MAX_NODES} values; are YAML aliases nested?")
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)


def _kind_of(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"


def explain(error: ValidationError, *, where: str, data: Any) -> str:
    """Return one line per mistake: its path, what is wrong, what is allowed, the nearest name."""
    problems = [(_keys(problem, data), problem) for problem in error.errors()]
    deepest = [problem for keys, problem in problems if not _is_other_choice(keys, problem, [k for k, _ in problems])]
    lines = [_explain_one(problem, data) for problem in deepest]
    unique = list(dict.fromkeys(lines))
    count = "1 mistake" if len(unique) == 1 else f"{len(unique)} mistakes"
    return f"{where}: {count}\n" + "\n".join(f"  {line}" for line in unique)


def _keys(problem: Any, data: Any) -> tuple[Any, ...]:
    """Return a problem's place in the recipe. Pydantic adds the names of a union's choices, which are no keys."""
    keys = []
    for part in problem["loc"]:
        known = data if isinstance(data, Mapping) else range(len(data)) if isinstance(data, list | tuple) else ()
        inside = part in known
        if inside:
            data = data[part]
        if inside or (problem["type"] == "missing" and part == problem["loc"][-1]):
            keys.append(part)
    return tuple(keys)


def _is_other_choice(keys: tuple[Any, ...], problem: Any, all_keys: Sequence[tuple[Any, ...]]) -> bool:
    """Tell "this should be text" of a section in which a mistake was found: whoever writes a section means one."""
    deeper = any(len(other) > len(keys) and other[: len(keys)] == keys for other in all_keys)
    return deeper and isinstance(problem.get("input"), Mapping)


def _explain_one(problem: Any, data: Any) -> str:
    path = ".".join(str(key) for key in _keys(problem, data))
    message = PLAIN.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = _fields_at(_keys(problem, data)[:-1], data)
        return f"{path}: unknown key.{did_you_mean(str(problem['loc'][-1]), known)} Allowed: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{path}: must be given"
    given = problem.get("input")
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool | type(None)) else ""
    if problem["type"] in {"component", "component_type", NOT_SHOWN}:
        return f"{path}: {message}"
    return f"{path}: {_continued(message)}{shown}"


def _continued(message: str) -> str:
    """Let a sentence go on after a colon, unless it begins with a name, such as a file's."""
    first = message.split(maxsplit=1)[0]
    return message[0].lower() + message[1:] if first.strip("'").isalpha() else message


def _fields_at(keys: Sequence[Any], data: Any) -> list[str]:
    """Return the keys allowed at a place of the recipe, following components by the type the data names."""
    model: type[Section] = Recipe
    for depth, key in enumerate(keys):
        data = data[key]
        of_kind = registry().components.get(keys[0], {})
        if of_kind and isinstance(data, Mapping) and (depth == 0 or isinstance(key, int)):
            model = of_kind.get(str(data.get("type")), model)
        elif key in model.model_fields:
            model = _section_of(model.model_fields[key].annotation) or model
    return list(model.model_fields)


def _section_of(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None
