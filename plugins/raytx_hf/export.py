"""The Hugging Face directory as an export component."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raytx.components import ExportConfig, Exporter


class HFExport(ExportConfig):
    """A Hugging Face directory: config, safetensors, tokenizer, generation config and model card."""

    type: Literal["hf"] = "hf"
    max_shard_size: str = Field("5GB", pattern=r"^\d+\s*[KMG]?B$")
    """Largest weight file; bigger models are cut into several."""

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"save_pretrained"})

    def build(self) -> Exporter:
        from raytx_hf.directory import HFDirectory

        return HFDirectory(self)
