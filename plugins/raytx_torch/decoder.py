"""The small decoder of our own as a model component."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from pydantic import Field

from raytx.components import Model, ModelConfig, ModelSize
from raytx.registry import registry
from raytx.sections import Section
from raytx.tasks import CausalLM, Task


class DecoderTokenizer(Section):
    """A tokenizer trained on the training rows."""

    train: Literal["bpe", "wordpiece"] = "bpe"
    """Algorithm: byte-level BPE, which can spell any text, or WordPiece."""
    vocab_size: int | None = Field(None, gt=0)
    """Tokens to learn; null takes the model's vocab_size."""


class DecoderConfig(ModelConfig):
    """A small decoder-only transformer (RMSNorm, rotary, grouped-query attention, SwiGLU), trained from nothing."""

    plugins: ClassVar[tuple[str, ...]] = ("raytx_hf",)
    """Plugins of which this component uses a component: raytx_hf's model, for tokenizers and saving."""
    architectures: ClassVar[tuple[str, ...]] = ("raytx_decoder",)
    """Names of the architectures that register_architectures() makes known to transformers."""
    type: Literal["decoder"] = "decoder"
    hidden_size: int = Field(256, gt=0)
    """Width of the residual stream."""
    num_hidden_layers: int = Field(4, gt=0)
    """Blocks of attention and feed-forward."""
    num_attention_heads: int = Field(8, gt=0)
    """Query heads; hidden_size splits among them."""
    num_key_value_heads: int = Field(4, gt=0)
    """Key and value heads, each shared by a group of query heads."""
    intermediate_size: int = Field(688, gt=0)
    """Width inside the gated feed-forward layer."""
    max_position_embeddings: int = Field(1024, gt=1)
    """Tokens of context."""
    vocab_size: int = Field(4096, gt=0)
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    tokenizer: str | DecoderTokenizer = DecoderTokenizer()
    """A tokenizer's hub name or directory, or how to train one."""
    packing: bool = True
    """Fill samples with several documents that cannot see each other."""

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"save_pretrained", "generate"})

    def task_class(self) -> type[Task]:
        return CausalLM

    def size(self) -> ModelSize:
        return self._hf().size()

    def build(self) -> Model:
        return self._hf().build()

    def local_files(self) -> Iterable[tuple[str, str]]:
        return self._component().local_files()

    @staticmethod
    def register_architectures() -> None:
        from raytx_torch import decoder_model

        decoder_model.register()

    def _hf(self) -> ModelConfig:
        """Register the architecture and return the Hugging Face component that trains it."""
        self.register_architectures()
        return self._component()

    def _component(self) -> ModelConfig:
        own = {"type", "tokenizer", "packing"}
        config = {"model_type": "raytx_decoder"} | self.model_dump(exclude=own)
        tokenizer: Any = self.tokenizer if isinstance(self.tokenizer, str) else self.tokenizer.model_dump()
        fields = {"task": CausalLM.name, "config": config, "tokenizer": tokenizer, "packing": self.packing}
        found = registry().find("model", "hf").model_validate({"type": "hf", **fields})
        assert isinstance(found, ModelConfig)
        return found
