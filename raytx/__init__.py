"""raytx: one recipe becomes a trained, exported and served transformer on Ray.

recipe = raytx.load("recipe.yaml")
print(raytx.plan(recipe))
result = raytx.train(recipe)
raytx.serve(result.artifacts["hf"])
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from raytx.hookspecs import hookimpl

if TYPE_CHECKING:
    from raytx.export import export
    from raytx.plan import resolve as plan
    from raytx.recipe import Recipe, load
    from raytx.serve import serve
    from raytx.submit import submit
    from raytx.train import train
    from raytx.tune import tune

__version__ = "0.1.0"

_LAZY = {
    "Recipe": ("raytx.recipe", "Recipe"),
    "load": ("raytx.recipe", "load"),
    "plan": ("raytx.plan", "resolve"),
    "train": ("raytx.train", "train"),
    "tune": ("raytx.tune", "tune"),
    "export": ("raytx.export", "export"),
    "serve": ("raytx.serve", "serve"),
    "submit": ("raytx.submit", "submit"),
}

__all__ = ["Recipe", "export", "hookimpl", "load", "plan", "serve", "submit", "train", "tune"]


class _Package(types.ModuleType):
    """The package with its verbs as attributes, imported when first used, so that `raytx --help` needs no Ray.

    `raytx.train` is a function that lives in the module of that name. Importing a submodule makes Python put the module
    under its name into the package, over the function; a property stays on top.
    """


def _verb(name: str) -> property:
    def get(_: Any) -> Any:
        module, attribute = _LAZY[name]
        return getattr(importlib.import_module(module), attribute)

    return property(get, lambda _, submodule: None)


for _name in _LAZY:
    setattr(_Package, _name, _verb(_name))
sys.modules[__name__].__class__ = _Package
