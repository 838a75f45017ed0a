"""Save a model as a Hugging Face directory and open one again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_model, save_model

from raytx.components import Compressor, Exportable, Model
from raytx.errors import ArtifactError
from raytx.files import write_text
from raytx.tasks.base import Runner, Task

if TYPE_CHECKING:
    from raytx_hf.export import HFExport

WEIGHTS = "model.safetensors"


class HFDirectory:
    """Fulfils raytx.components.Exporter.

    A compressed module whose tensors are still those of its architecture is saved as any other. One whose structure
    changed is no class that transformers knows: its state dict is saved, and loaded into the structure that the
    compressors restore.
    """

    def __init__(self, config: HFExport) -> None:
        self.config = config

    def save(self, exportable: Exportable, directory: Path) -> None:
        module = exportable.module
        _settle_generation(module, exportable.task)
        if exportable.compressors and _restructured(exportable.model, module, directory):
            _save_state(module, directory)
        else:
            module.save_pretrained(directory, max_shard_size=self.config.max_shard_size)
        exportable.task.tokenizer.save_pretrained(directory)
        exportable.task.save(directory)
        write_text(directory / "README.md", exportable.card)

    def load(self, directory: Path, model: Model, compressors: list[Compressor]) -> Runner:
        if compressors:
            restored = model.skeleton(directory)
            plain = _structure(restored)
            for compressor in compressors:
                restored = compressor.restore(restored)
            if _structure(restored) != plain:
                return model.runner(_load_state(restored, directory))
        return model.runner(model.load(directory))


def _settle_generation(module: Any, task: Task) -> None:
    """Say in the generation config where a completion ends and what pads it."""
    if task.protocol == "openai":
        module.generation_config.eos_token_id = task.tokenizer.eos_token_id
        module.generation_config.pad_token_id = task.tokenizer.pad_token_id


def _restructured(model: Model, module: Any, directory: Path) -> bool:
    module.config.save_pretrained(directory)
    return _structure(module) != _structure(model.skeleton(directory))


def _structure(module: Any) -> dict[str, Any]:
    """Name, shape and dtype of everything in the state dict; what is no tensor counts by its type."""
    return {
        name: (tuple(value.shape), value.dtype) if hasattr(value, "shape") else type(value)
        for name, value in module.state_dict().items()
    }


def _save_state(module: Any, directory: Path) -> None:
    if odd := [name for name, value in module.state_dict().items() if not hasattr(value, "shape")]:
        raise ArtifactError(f"the compressed module keeps {odd[0]!r}, which is no tensor; safetensors cannot hold it")
    module.config.save_pretrained(directory)
    if module.can_generate():
        module.generation_config.save_pretrained(directory)
    save_model(module, str(directory / WEIGHTS), metadata={"format": "pt"})  # tied tensors are written once


def _load_state(module: Any, directory: Path) -> Any:
    load_model(module, str(directory / WEIGHTS), strict=True)
    return module.eval()
