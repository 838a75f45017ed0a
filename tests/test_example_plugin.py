"""The example plugin, installed into an environment of its own, is used like one of ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "plugin"


@dataclass(frozen=True)
class Environment:
    """A fresh virtual environment that sees the packages of this one, with the plugin installed."""

    python: Path
    home: Path

    def run(self, *arguments: str, timeout: float = 120) -> str:
        """Run Python with arguments; fail with its output unless it exits with 0."""
        command = [str(self.python), *arguments]
        quiet = os.environ | {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "COLUMNS": "200"}
        done = subprocess.run(command, cwd=self.home, env=quiet, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def environment() -> Iterator[Environment]:
    with tempfile.TemporaryDirectory(prefix="rx") as name:  # short: Ray's sockets lie below it
        home = Path(name)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home / "env")], check=True)
        python = home / "env" / "bin" / "python"
        (site,) = (home / "env" / "lib").glob("python*/site-packages")
        outer = sysconfig.get_paths()["purelib"]
        (site / "outer.pth").write_text(f"import site; site.addsitedir({outer!r})\n")
        shutil.copytree(EXAMPLE, home / "source")
        install = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", str(home / "source")]
        subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
        yield Environment(python, home)


def test_an_installed_plugin_appears_beside_ours(environment: Environment) -> None:
    found: dict[str, Any] = json.loads(environment.run("-m", "raytx", "plugins", "--json"))
    assert found["broken"] == []
    for kind, type_, ours in (("model", "gated-conv", "decoder"), ("compression", "svd", "l1-pruning")):
        owners = {entry["type"]: entry["plugin"] for entry in found["components"][kind]}
        assert owners[type_] == "raytx_example_plugin"
        assert owners[ours] == "raytx_torch"


def test_the_command_line_lists_and_describes_it(environment: Environment) -> None:
    assert "gated-conv" in environment.run("-m", "raytx", "plugins")
    assert "kernel_size" in environment.run("-m", "raytx", "plugins", "model", "gated-conv")
    assert "ratio" in environment.run("-m", "raytx", "plugins", "compression", "svd")


def test_its_own_conformance_tests_pass_where_it_is_installed(environment: Environment) -> None:
    told = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "source/tests", timeout=300)
    assert " passed" in told


@pytest.mark.slow
def test_its_recipe_trains_compresses_and_exports(environment: Environment) -> None:
    overrides = [f"storage_path={environment.home}", "train.steps=12", "evaluate.every=6"]
    environment.run("-m", "raytx", "train", "source/recipe.yaml", *overrides, timeout=600)
    artifact = environment.home / "example-plugin" / "artifacts" / "hf"
    manifest = json.loads((artifact / "artifact.json").read_text())
    assert manifest["model"]["type"] == "gated-conv"
    assert [step["type"] for step in manifest["compression"]] == ["svd"]
    assert manifest["golden_difference"] <= 1e-4
    assert manifest["plugins"]["raytx_example_plugin"] == "0.1.0"
    answer = environment.run("-c", ASK.format(artifact=str(artifact)))
    assert json.loads(answer.splitlines()[-1])["completion_tokens"] == 8


ASK = """
import json
from raytx.artifact import open_artifact
(answer,) = open_artifact({artifact!r}).predict([{{"prompt": "import", "max_tokens": 8}}])
print(json.dumps(answer))
"""
