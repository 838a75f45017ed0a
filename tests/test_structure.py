"""The house stands: floors are kept, and whatever only reads recipes is light and quick."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("raytx/**/*.py"), *ROOT.glob("plugins/**/*.py"), *ROOT.glob("examples/**/*.py")])
HEAVY = (
    "torch",
    "ray",
    "transformers",
    "datasets",
    "deepspeed",
    "peft",
    "onnx",
    "onnxruntime",
    "sklearn",
    "matplotlib",
)
CPU_S = 1.0
"""What a user waits for `raytx plugins` at most; about a third of it is usual."""


def test_every_import_contract_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    failed = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert not failed, capsys.readouterr().out


def test_every_module_of_the_host_stands_on_a_floor() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (floors,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    standing = {name.strip() for floor in floors for name in floor.split("|")}
    modules = {f"raytx.{path.stem}" for path in (ROOT / "raytx").glob("[!_]*.py")}
    packages = {f"raytx.{path.parent.name}" for path in (ROOT / "raytx").glob("*/__init__.py")}
    assert standing == modules | packages


READS = {
    "the command line": "import raytx.cli",
    "the API": "import raytx; raytx.Recipe; raytx.load",
    "the catalogue": "from raytx.schema import catalogue; catalogue()",
    "the schema": "from raytx.schema import schema; schema()",
    "a wrong recipe": """
from raytx.errors import RecipeError
from raytx.recipe import parse
try:
    parse({"name": "x", "model": {"type": "decoder", "hiden": 3}, "data": {"type": "flies"}, "export": "x"})
except RecipeError as error:
    assert "3 mistakes" in str(error), error
else:
    raise SystemExit("it was taken")
""",
    "the check for plugin authors": "import raytx.testing",
}


@pytest.mark.parametrize("code", READS.values(), ids=READS.keys())
def test_whatever_only_reads_recipes_loads_no_heavy_library_and_answers_within_a_second(code: str) -> None:
    modules, cpu_s = measured(code)
    assert set(HEAVY) & modules == set()
    for _ in range(2):  # processor time, unlike the clock's, is the process's own, yet it varies with what others do
        if cpu_s < CPU_S:
            break
        cpu_s = min(cpu_s, measured(code)[1])
    assert cpu_s < CPU_S


def measured(code: str) -> tuple[set[str], float]:
    """Run code in a new process; return the modules it loaded and the seconds of processor time it took."""
    tail = "\nimport json, os, sys\nprint(json.dumps([list(sys.modules), os.times().user]))"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, check=True, timeout=60)
    modules, cpu_s = json.loads(done.stdout.splitlines()[-1])
    return set(modules), cpu_s


@pytest.mark.parametrize("plugin", sorted(path.name for path in (ROOT / "plugins").iterdir() if path.is_dir()))
def test_a_plugin_is_listed_without_loading_what_it_is_for(plugin: str) -> None:
    modules, _ = measured(f"import {plugin}")
    assert set(HEAVY) & modules == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_in_one_line_what_it_is(path: Path) -> None:
    told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert told, "it has no docstring"
    first, _, rest = told.partition("\n")
    assert len(first) <= 120
    assert not rest or rest.startswith("\n"), "the first line stands by itself"
