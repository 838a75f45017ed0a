"""The transformers config and module that a model component stands for, before any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from raytx.errors import RecipeError, did_you_mean
from raytx.registry import registry

if TYPE_CHECKING:
    from raytx_hf.model import HFModel

transformers.utils.logging.disable_progress_bar()  # its bars would break the host's own progress line

AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
}


def auto_class(task: str) -> Any:
    return getattr(transformers, AUTO_CLASSES[task])


def base_config(model: HFModel) -> PreTrainedConfig:
    """Return the model's config as the hub, the directory or the recipe has it; raise RecipeError where it is none."""
    config = _from_recipe(model.config) if model.config is not None else _from_path(model)
    if type(config) not in auto_class(model.task)._model_mapping and not hasattr(config, "auto_map"):
        raise RecipeError(f"model: transformers has no {config.model_type!r} model for task {model.task!r}")
    return config


def make_known(directory: str | Path) -> None:
    """Let the model component that brings a directory's architecture register it with the Auto classes, if one does.

    A plugin's own architecture is known to transformers only once its component has been used; its artifacts must open,
    and be fine-tuned, without it.
    """
    try:
        name = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return  # a hub name, or a directory that transformers will refuse in its own words
    for component in registry().components["model"].values():
        if name in getattr(component, "architectures", ()):
            component.register_architectures()  # type: ignore[attr-defined]


def check_attention(model: HFModel) -> None:
    """Raise RecipeError for the name of a kernel that transformers does not know; owner/name is one on the hub."""
    name, known = model.attn_implementation, ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if name is not None and name not in known and "/" not in name:
        raise RecipeError(
            f"model.attn_implementation: no kernel {name!r}.{did_you_mean(name, known)} Allowed: {', '.join(known)}"
        )


def from_config(model: HFModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Return a module with random weights drawn from torch's generator, fp32."""
    options = {"attn_implementation": model.attn_implementation} if model.attn_implementation else {}
    try:
        return auto_class(model.task).from_config(
            config, dtype=torch.float32, trust_remote_code=model.trust_remote_code, **options
        )
    except Exception as error:  # sizes that do not go together fail anywhere in the architecture's own code
        raise RecipeError(f"model: {config.model_type!r} cannot be built: {_one_line(error)}") from None


def expanded(place: str) -> str:
    return str(Path(place).expanduser()) if place.startswith("~") else place


def _from_path(model: HFModel) -> PreTrainedConfig:
    assert model.path is not None
    make_known(expanded(model.path))
    try:
        return AutoConfig.from_pretrained(
            expanded(model.path), revision=model.revision or "main", trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise RecipeError(f"model.path={model.path}: no model could be read there: {_one_line(error)}") from None


def _from_recipe(values: dict[str, Any]) -> PreTrainedConfig:
    values = dict(values)
    name = values.pop("model_type")
    if name not in CONFIG_MAPPING:
        raise RecipeError(f"model.config.model_type: transformers has no {name!r}.{did_you_mean(name, CONFIG_MAPPING)}")
    _check_keys(name, values)
    try:
        return AutoConfig.for_model(name, **values)
    except Exception as error:  # the config classes validate, each with exceptions of its own
        raise RecipeError(f"model.config: {name!r} refuses it: {_one_line(error)}") from None


def _check_keys(name: str, values: dict[str, Any]) -> None:
    """A config takes any key as an attribute; one that the architecture never reads is a mistake."""
    known = set(CONFIG_MAPPING[name]().to_dict()) | set(CONFIG_MAPPING[name].attribute_map)
    if unknown := [key for key in values if key not in known]:
        raise RecipeError(
            f"model.config.{unknown[0]}: {name!r} has no such key.{did_you_mean(unknown[0], known)} "
            f"Allowed: {', '.join(sorted(key for key in known if not key.startswith('_')))}"
        )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:399]}…"
