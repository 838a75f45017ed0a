"""The recipe: what to learn. Load it from YAML or Python, override it, dump it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, field_validator

from raytx.components import (
    CompressionConfig,
    Component,
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

C = TypeVar("C", bound=Component)


def _component(kind: str) -> BeforeValidator:
    return BeforeValidator(lambda value: registry().parse(kind, value))


class Recipe(Section):
    """Everything a run is made of. A recipe in YAML and the same in Python are equal values."""

    name: str = Field(min_length=1, max_length=100)
    """Names the run and its directory. Training a name again goes on where it was."""
    storage_path: str = "~/raytx-runs"
    """Where run directories live; on several nodes a directory that all of them share."""
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

    def components(self) -> Iterator[Component]:
        """Yield every component of the recipe, in the order in which a run meets them."""
        yield from (self.model, self.data, self.strategy, *self.compression, *self.export)

    def dump(self) -> dict[str, Any]:
        """Return the recipe as plain data, defaults included."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the recipe as YAML that loads to an equal recipe; values left at their default are left out."""
        plain = self.model_dump(mode="json", exclude_defaults=True)
        for name in ("model", "data", "strategy"):
            _keep_type(plain, name, getattr(self, name))
        for name in ("compression", "export"):
            for place, component in enumerate(getattr(self, name)):
                plain[name][place] = {"type": component.type, **plain[name][place]}
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)

    def override(self, values: Mapping[str, Any]) -> Recipe:
        """Return a recipe with dotted paths replaced; raise RecipeError for unknown ones."""
        plain = yaml.safe_load(self.to_yaml())
        return parse(apply(plain, values), where="override")


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
        data = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, this is {_kind_of(data)}")
    _bound(data, path)
    return data


def parse(data: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Validate plain data into a recipe; raise RecipeError with every mistake, its path and the nearest name."""
    try:
        return Recipe.model_validate(_floats(data))
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
            values[path.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"override {text!r}: the value is not valid YAML: {' '.join(str(error).split())}") from None
    return values


def apply(data: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain data with dotted paths set; list items are addressed by index (export.0.opset)."""
    result = _copy(data)
    for path, value in values.items():
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


_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _floats(value: Any) -> Any:
    """YAML 1.1 reads 2e-5 as text (it wants 2.0e-5); nobody writing a learning rate means text."""
    if isinstance(value, Mapping):
        return {key: _floats(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_floats(inner) for inner in value]
    return float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value


def _bound(data: Any, path: Path) -> None:
    """Refuse YAML whose aliases expand to more than anybody wrote."""
    pending, seen = [data], 0
    while pending:
        value = pending.pop()
        seen += 1
        if seen > MAX_NODES:
            raise RecipeError(f"{path}: expands to more than {MAX_NODES} values; are YAML aliases nested?")
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)


def _kind_of(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"


def explain(error: ValidationError, *, where: str, data: Any) -> str:
    """Return one line per mistake: its path, what is wrong, what is allowed, the nearest name."""
    lines = [_explain_one(problem, data) for problem in error.errors()]
    unique = list(dict.fromkeys(lines))
    count = "1 mistake" if len(unique) == 1 else f"{len(unique)} mistakes"
    return f"{where}: {count}\n" + "\n".join(f"  {line}" for line in unique)


def _explain_one(problem: Any, data: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = _fields_at(problem["loc"][:-1], data)
        return f"{path}: unknown key.{did_you_mean(str(problem['loc'][-1]), known)} Allowed: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{path}: must be given"
    given = problem.get("input")
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool | type(None)) else ""
    if problem["type"] in {"component", "component_type"}:
        return f"{path}: {message}"
    return f"{path}: {message[0].lower()}{message[1:]}{shown}"


def _fields_at(location: Sequence[Any], data: Any) -> list[str]:
    """Return the keys allowed at a place of the recipe, following components by the type the data names."""
    model: Any = Recipe
    for part in location:
        data = data.get(part) if isinstance(data, Mapping) else data[part]
        kind = part if isinstance(part, str) else kind
        if kind in registry().components:
            if isinstance(data, Mapping) and isinstance(data.get("type"), str):
                model = registry().components[kind].get(data["type"], model)
        elif isinstance(model, type) and part in model.model_fields:
            model = _section_of(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _section_of(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None
