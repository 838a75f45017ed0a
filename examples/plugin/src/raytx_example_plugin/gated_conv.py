"""The gated-conv model component: what a recipe may say of it."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from raytx.components import Model, ModelConfig, ModelSize
from raytx.registry import registry
from raytx.tasks import CausalLM, Task


class GatedConv(ModelConfig):
    """A causal language model of gated convolutions instead of attention, trained from nothing."""

    plugins: ClassVar[tuple[str, ...]] = ("raytx_hf",)
    """Plugins of which this component uses a component: raytx_hf's model, for tokenizers, saving and serving."""
    type: Literal["gated-conv"] = "gated-conv"
    hidden_size: int = Field(256, gt=0)
    """Width of the residual stream."""
    num_hidden_layers: int = Field(6, gt=0)
    """Blocks of a convolution and a feed-forward layer."""
    kernel_size: int = Field(8, gt=1)
    """Tokens that one convolution looks at: the current one and those before it."""
    vocab_size: int = Field(4096, gt=0)
    """Rows of the embedding, and tokens that a trained tokenizer learns."""
    tokenizer: str | None = None
    """A tokenizer's hub name or directory; null trains a byte-level BPE on the training rows."""
    packing: bool = True
    """Fill samples with several documents that cannot see each other."""

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"save_pretrained"})

    def task_class(self) -> type[Task]:
        return CausalLM

    def size(self) -> ModelSize:
        return self._hf().size()

    def build(self) -> Model:
        return self._hf().build()

    def _hf(self) -> ModelConfig:
        """Register the architecture and return the Hugging Face component that trains it."""
        from raytx_example_plugin import gated_conv_model

        gated_conv_model.register()
        shape = self.model_dump(exclude={"type", "tokenizer", "packing"})
        found = (
            registry()
            .find("model", "hf")
            .model_validate(
                {
                    "task": CausalLM.name,
                    "config": {"model_type": gated_conv_model.GatedConvConfig.model_type, **shape},
                    "tokenizer": self.tokenizer or {"train": "bpe"},
                    "packing": self.packing,
                }
            )
        )
        assert isinstance(found, ModelConfig)
        return found
