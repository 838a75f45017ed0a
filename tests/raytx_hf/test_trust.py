"""Whose code may run when a directory is opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytx.errors import ArtifactError, RaytxError
from raytx.registry import registry

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "of_its_own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
OPENINGS: dict[str, Callable[[Any, Path], Any]] = {
    "load": lambda model, directory: model.load(directory),
    "skeleton": lambda model, directory: model.skeleton(directory),
    "task": lambda model, directory: model.task(directory),
}


@pytest.fixture
def foreign(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A directory whose files ask for its own code, a component that trusts it, and the mark the code leaves."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.delenv("RAYTX_TRUST_REMOTE_CODE", raising=False)
    directory, mark = tmp_path / "artifact", tmp_path / "ran"
    made = tiny.prepared(tiny.causal["llama"], directory)
    made.module(directory).save_pretrained(directory)
    (directory / "own_code.py").write_text(CODE.format(marker=str(mark)))
    classes = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    _amend(directory / "config.json", model_type="of_its_own", auto_map=classes)
    tokenizer = {"AutoTokenizer": [None, "own_code.OwnTokenizer"]}
    _amend(directory / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=tokenizer)
    trusting = {"type": "hf", "task": "causal-lm", "path": str(directory), "trust_remote_code": True}
    return SimpleNamespace(directory=directory, mark=mark, model=registry().parse("model", trusting).build())


def _amend(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("opening", OPENINGS)
def test_opening_runs_no_code_whatever_the_artifact_says(foreign: Any, opening: str) -> None:
    with pytest.raises(ArtifactError, match=r"needs code from its own directory; set RAYTX_TRUST_REMOTE_CODE=1 if you"):
        OPENINGS[opening](foreign.model, foreign.directory)
    assert not foreign.mark.exists()


@pytest.mark.parametrize("opening", OPENINGS)
def test_who_opens_it_may_trust_it(foreign: Any, opening: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYTX_TRUST_REMOTE_CODE", "1")
    OPENINGS[opening](foreign.model, foreign.directory)
    assert foreign.mark.exists()


def test_a_known_architecture_is_opened_by_the_class_that_is_installed(foreign: Any) -> None:
    _amend(foreign.directory / "config.json", model_type="llama")
    assert type(foreign.model.load(foreign.directory)).__module__.startswith("transformers.")
    assert type(foreign.model.skeleton(foreign.directory)).__module__.startswith("transformers.")
    assert not foreign.mark.exists()


@pytest.mark.parametrize("trust", [False, True])
def test_training_from_a_path_obeys_the_recipe(foreign: Any, trust: bool) -> None:
    fields = {"task": "causal-lm", "path": str(foreign.directory), "trust_remote_code": trust}
    component = registry().parse("model", {"type": "hf", **fields})
    if trust:
        assert component.size().layers == 2
    else:
        with pytest.raises(RaytxError, match="custom code"):
            component.size()
    assert foreign.mark.exists() is trust
