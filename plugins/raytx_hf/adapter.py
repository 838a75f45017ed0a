"""Low-rank adapters through peft: put them on, and merge them into the base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raytx.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from raytx_hf.model import LoRA

TASK_TYPES = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}
"""peft's names; with SEQ_CLS it trains the new classifier head besides the adapters."""


def adapted(module: Any, lora: LoRA, *, task: str) -> Any:
    """Return the module with adapters on, everything else frozen; raise RecipeError where no layer has that name."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type=TASK_TYPES[task],
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(module, lora),
    )
    try:
        return get_peft_model(module, config)
    except (TypeError, ValueError) as error:  # TypeError: all-linear would adapt the head that is trained whole
        raise RecipeError(f"model.adapter: {' '.join(str(error).split())}") from None


def merged(module: Any) -> Any:
    """Return the base with its adapters merged; a merge that gives NaN is an error, not a model."""
    return module.merge_and_unload(safe_merge=True) if hasattr(module, "merge_and_unload") else module


def _targets(module: Any, lora: LoRA) -> list[str] | str | None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

    if lora.target_modules is None:
        return None if module.config.model_type in USUAL else "all-linear"
    if isinstance(lora.target_modules, str):
        return lora.target_modules
    layers = {name.rpartition(".")[2] for name, layer in module.named_modules() if hasattr(layer, "weight")}
    for target in lora.target_modules:
        if target.rpartition(".")[2] not in layers:
            raise RecipeError(
                f"model.adapter.target_modules: the model has no layer {target!r}.{did_you_mean(target, layers)} "
                f"Allowed: {', '.join(sorted(layers))}"
            )
    return list(lora.target_modules)
