"""The model behind the hf component: fit its processor, make its module, merge, load and run it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from raytx.components import Piece, TensorGroup, TensorPlan, Weights
from raytx.errors import CheckpointError, RecipeError
from raytx.files import digest
from raytx.place import place
from raytx.tasks.base import Row, Runner, Task
from raytx_hf import adapter
from raytx_hf.architecture import auto_class, base_config, expanded, from_config, make_known
from raytx_hf.causality import check_causality
from raytx_hf.packing import check_packing
from raytx_hf.places import hashes
from raytx_hf.runner import TorchRunner
from raytx_hf.tokenizer import fitted, opened
from raytx_hf.trust import refusing_code, trusted
from raytx_hf.weights import Adapted, Drawn, Stored, reader

if TYPE_CHECKING:
    from raytx_hf.model import HFModel


class HFBody:
    """Fulfils raytx.components.Model for any transformers architecture that has the task."""

    def __init__(self, config: HFModel) -> None:
        self.config = config

    def fingerprint(self) -> str:
        """Return a name of the local files that the processor is made from; hub names and revisions say the rest."""
        return digest({key: hashes(place) for key, place in self.config.places().items()})

    def fit(self, rows: Callable[[], Iterator[Row]], directory: Path, *, max_length: int) -> None:
        config = base_config(self.config)
        if self.config.task == "causal-lm":
            check_causality(self.config, config)
            if self.config.packing:
                check_packing(self.config, config)
        tokenizer = fitted(self.config, rows, config.get_text_config())
        _complete(tokenizer, task=self.config.task)
        _check_vocabulary(config, tokenizer)
        _check_length(config, tokenizer, max_length)
        learned = self.config.task_class().fit(rows)
        task = self.config.task_class()(tokenizer, max_length=max_length, **learned, **self._options(config))
        tokenizer.save_pretrained(directory)
        task.save(directory)

    def _options(self, config: PreTrainedConfig) -> dict[str, Any]:
        if self.config.task != "causal-lm":
            return {}
        return {"packing": self.config.packing, "context_length": _context_length(config) or 0}

    def task(self, directory: Path) -> Task:
        with refusing_code(directory):
            tokenizer = opened(directory, local_files_only=True, trust_remote_code=trusted())
        return self.config.task_class().load(directory, tokenizer)

    def module(self, directory: Path, *, seed: int = 0, activation_checkpointing: bool = False) -> Any:
        module = self.structure(directory, activation_checkpointing=activation_checkpointing)
        weights = self._weights(directory, seed=seed)
        place(module, lambda name, meta: _filled(meta, weights(name)))
        return module

    def structure(self, directory: Path, *, activation_checkpointing: bool = False) -> Any:
        module = self._plain(directory)
        # A cache would hide from transformers that positions restarting at 0 begin a new document: no packing mask.
        module.config.use_cache = False
        if activation_checkpointing:
            module.activation_checkpointing_enable({"use_reentrant": False})
        if self.config.adapter is None:
            return module
        with torch.device("meta"):
            return adapter.adapted(module, self.config.adapter, task=self.config.task)

    def weights(self, directory: Path, *, seed: int = 0) -> Weights:
        return reader(self._weights(directory, seed=seed))

    def tensor_plan(self, module: Any) -> TensorPlan:
        from raytx_hf.tensor_plan import plan_of

        return plan_of(module)

    def pieces(self, module: Any, travelling: Sequence[str]) -> list[Piece]:
        from raytx_hf.pieces import cut

        return cut(module, travelling)

    def _plain(self, directory: Path) -> PreTrainedModel:
        """Return the structure without adapters."""
        with torch.device("meta"):
            module = from_config(self.config, self._settled(directory))
        if self.config.path is not None and module.can_generate():
            with contextlib.suppress(OSError):  # most encoders, and many decoders, come without
                module.generation_config = GenerationConfig.from_pretrained(
                    expanded(self.config.path), revision=self.config.revision or "main"
                )
        return module

    def _weights(self, directory: Path, *, seed: int) -> Callable[[str], torch.Tensor]:
        """Return the reader. It goes by structures of its own: the strategy will cut the one it is given."""
        plain = self._plain(directory)
        drawn = Drawn(plain, lambda: from_config(self.config, self._settled(directory)), seed=seed)
        base = Stored(self.config, plain, drawn) if self.config.path is not None else drawn
        return base if self.config.adapter is None else Adapted(self.structure(directory), base, seed=seed)

    def _settled(self, directory: Path) -> PreTrainedConfig:
        config = base_config(self.config)
        self._adjust(config, self.task(directory))
        return config

    def _adjust(self, config: PreTrainedConfig, task: Task) -> None:
        """Write into the config what data and tokenizer settled: labels, and the ids of special tokens."""
        tokenizer = task.tokenizer
        if (labels := task.label_names()) is not None:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: index for index, label in enumerate(labels)}
            config.problem_type = "single_label_classification"
            config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if self.config.path is None:
            # pad_token_id stays out of a decoder's config: its embedding would be fixed at zero, and it is eos.
            config.bos_token_id = tokenizer.bos_token_id
            config.eos_token_id = tokenizer.eos_token_id
            if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
                config.decoder_start_token_id = tokenizer.pad_token_id  # T5's own choice, and it has no default

    def merged(self, module: Any) -> Any:
        module = adapter.merged(module)
        module.config.use_cache = True
        return module

    def consolidated(
        self,
        module: Any,
        tensors: Mapping[str, np.ndarray],
        weights: Weights,
        directory: Path,
        *,
        dtype: str,
        adapter_only: bool,
    ) -> list[TensorGroup]:
        from raytx_hf import consolidated

        if adapter_only:
            base = self.config.path
            return consolidated.adapter(module, tensors, weights, directory, base=base, dtype=dtype)
        return consolidated.whole(module, tensors, weights, directory, task=self.task(directory), dtype=dtype)

    def load(self, directory: Path) -> Any:
        auto = auto_class(self.config.task)
        options = {"local_files_only": True, "trust_remote_code": trusted(), "use_safetensors": True}
        with refusing_code(directory):
            make_known(directory)
            return auto.from_pretrained(directory, dtype=torch.float32, **options).eval()

    def skeleton(self, directory: Path) -> Any:
        with refusing_code(directory):
            make_known(directory)
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trusted())
        opening = {"trust_remote_code": trusted(), "attn_implementation": None}
        return from_config(self.config.model_copy(update=opening), config).eval()

    def assign(self, module: Any, tensors: Mapping[str, np.ndarray]) -> None:
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        if missing := sorted(trained - tensors.keys()):
            raise CheckpointError(f"the checkpoint lacks {len(missing)} trained parameters, {missing[0]!r} for one")
        state = module.state_dict()  # parameters and persistent buffers, sharing the module's memory
        if unknown := sorted(tensors.keys() - state.keys()):
            raise CheckpointError(f"the model has no {unknown[0]!r}, one of {len(unknown)} such in the checkpoint")
        with torch.no_grad():
            for name in tensors:
                _copy(name, torch.from_numpy(np.asarray(tensors[name])), into=state[name])

    def runner(self, module: Any) -> Runner:
        return TorchRunner(module)


def _filled(meta: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return a parameter or buffer like the one on the meta device, with a value; attributes are kept."""
    made: torch.Tensor = value.detach().to(meta.dtype).clone()
    if isinstance(meta, nn.Parameter):
        made = nn.Parameter(made, requires_grad=meta.requires_grad)
    made.__dict__.update(vars(meta))
    return made


def _copy(name: str, value: torch.Tensor, *, into: torch.Tensor) -> None:
    """Copy a value, which takes the dtype of its place; copy_ alone would spread a smaller one over it."""
    if value.shape != into.shape:
        raise CheckpointError(f"{name!r} is {tuple(value.shape)} in the checkpoint, {tuple(into.shape)} in the model")
    into.copy_(value)


def _complete(tokenizer: PreTrainedTokenizerBase, *, task: str) -> None:
    """Give a tokenizer the end and padding tokens that the task needs; raise RecipeError where it has no end."""
    if tokenizer.eos_token is None and (task == "causal-lm" or tokenizer.pad_token is None):
        raise RecipeError("model.tokenizer: it has no end-of-sequence token, so documents could not be told apart")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _check_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise RecipeError(
            f"model.config.vocab_size={rows} is smaller than the tokenizer's vocabulary of {len(tokenizer)}; "
            f"use {len(tokenizer)} or more, or a smaller tokenizer.vocab_size"
        )


def _check_length(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """A tokenizer's limit counts where it is lower: RoBERTa's first two positions, for one, hold no tokens."""
    limit = min(_context_length(config) or max_length, tokenizer.model_max_length)
    if max_length > limit:
        raise RecipeError(f"train.max_length={max_length} is more than the model's {limit} positions")


def _context_length(config: PreTrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)
