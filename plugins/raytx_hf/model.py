"""Any transformers model as a model component."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from raytx.components import Model, ModelConfig, ModelSize
from raytx.errors import did_you_mean
from raytx.sections import Section
from raytx.tasks import TASKS, Task
from raytx_hf.places import is_local


class TrainedTokenizer(Section):
    """A tokenizer trained on the training rows."""

    train: Literal["bpe", "wordpiece"] = "bpe"
    """Algorithm: byte-level BPE, which can spell any text, or WordPiece."""
    vocab_size: int | None = Field(None, gt=0)
    """Tokens to learn; null takes the model config's vocab_size."""


class LoRA(Section):
    """Low-rank adapters on a frozen base (Hu et al. 2021), merged into it at export."""

    type: Literal["lora"] = "lora"
    """Kind of adapter."""
    r: int = Field(8, gt=0)
    """Rank."""
    alpha: float = Field(16, gt=0)
    """The update is scaled by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapter."""
    target_modules: tuple[str, ...] | str | None = None
    """Names of the layers that get one, a regular expression or "all-linear"; null takes those usual for the family."""


class HFModel(ModelConfig):
    """A transformers model for a task: pretrained by name or directory, or a config with random weights."""

    type: Literal["hf"] = "hf"
    task: str
    """What it learns: causal-lm or sequence-classification."""
    path: str | None = None
    """Hub name or directory of a pretrained model."""
    config: dict[str, Any] | None = None
    """The config of a model that starts from random weights: {model_type: llama, hidden_size: 64, ...}."""
    tokenizer: str | TrainedTokenizer | None = None
    """Hub name or directory, or how to train one; null takes the model's own."""
    packing: bool = True
    """causal-lm: fill samples with several documents that cannot see each other."""
    adapter: LoRA | None = None
    """Train adapters instead of the whole model."""
    revision: str | None = None
    """Commit, branch or tag of a hub model."""
    attn_implementation: str | None = None
    """Attention kernel: sdpa, eager, flash_attention_2...; null lets transformers choose."""
    trust_remote_code: bool = False
    """Run Python code that comes with path or tokenizer. Only for authors you trust. Opening what was prepared or
    exported runs no code whatever is said here, unless RAYTX_TRUST_REMOTE_CODE=1 is set where it is opened."""

    @field_validator("task")
    @classmethod
    def _known_task(cls, task: str) -> str:
        if task not in TASKS:
            raise ValueError(f"no such task.{did_you_mean(task, TASKS)} Allowed: {', '.join(TASKS)}")
        return task

    @field_validator("config")
    @classmethod
    def _typed_config(cls, config: dict[str, Any] | None) -> dict[str, Any] | None:
        if config is not None and not isinstance(config.get("model_type"), str):
            raise ValueError("must name its architecture: {model_type: llama, ...}")
        return config

    @model_validator(mode="after")
    def _one_origin(self) -> HFModel:
        if (self.path is None) == (self.config is None):
            raise ValueError("give either path (a pretrained model) or config (random weights)")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("a model made from config has no tokenizer; give tokenizer: {train: bpe} or a name")
        if self.config is not None and self.revision is not None:
            raise ValueError("revision belongs to path; a model made from config has none")
        return self

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"save_pretrained", "generate"} if self.task == "causal-lm" else {"save_pretrained"})

    def distrusted(self) -> HFModel:
        from raytx_hf.trust import trusted

        return self if trusted() else self.model_copy(update={"trust_remote_code": False})

    def task_class(self) -> type[Task]:
        return TASKS[self.task]

    def size(self) -> ModelSize:
        from raytx_hf.size import measure

        return measure(self)

    def build(self) -> Model:
        from raytx_hf.body import HFBody

        return HFBody(self)

    def local_files(self) -> Iterable[tuple[str, str]]:
        return ((key, place) for key, place in self.places().items() if is_local(place))

    def places(self) -> dict[str, str]:
        """Return the names and directories that the model and its tokenizer come from, by field."""
        places = {"path": self.path, "tokenizer": self.tokenizer}
        return {key: place for key, place in places.items() if isinstance(place, str)}
