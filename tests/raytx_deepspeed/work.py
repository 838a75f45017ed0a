"""A tiny training job in two forms: written out in plain torch for one process, and through the engine under test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from raytx.components import Microbatch, TensorPlan, TensorStyle
from raytx.layout import Layout
from raytx.optimizer import build, parameter_groups
from raytx.plan import Plan, resolve
from raytx.recipe import parse
from raytx_deepspeed.place import materialise
from raytx_deepspeed.tensor import Share, cut

STEPS, BATCH, MICRO, LENGTH, VOCABULARY, LIMIT = 10, 8, 2, 16, 66, 0.5
EPSILON = 1e-5
"""Adam would divide a gradient that is nothing but rounding by itself, and make a step of it, without any."""
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56}
LLAMA = {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "head_dim": 8}
ADAPTED = ["q_proj", "o_proj", "up_proj", "down_proj"]
FAMILIES = {
    "llama": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "qwen3": {**LLAMA, "model_type": "qwen3"},
    "lora": LLAMA,
    "mixtral": {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 5},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def structure(family: str, *, device: str = "meta") -> nn.Module:
    """Return a family's module on the meta device, as a model component would; "lora" has a frozen base."""
    config = AutoConfig.for_model(**FAMILIES[family], vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config)
        module.config.use_cache = False
        if family == "lora":
            module = get_peft_model(
                module, LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"])
            )
    return module


@cache
def values(family: str) -> dict[str, torch.Tensor]:
    """Return starting weights and buffers, large enough that what is forgotten shows."""
    module, generator = structure(family, device="cpu"), torch.Generator().manual_seed(1)
    made = {
        name: torch.randn(p.shape, generator=generator) * (0.15 if p.ndim > 1 else 0.05) + (p.ndim == 1)
        for name, p in module.named_parameters()
    }
    return made | dict(module.named_buffers())


class Stand:
    """As much of a model component as a strategy asks for."""

    def tensor_plan(self, module: nn.Module) -> TensorPlan:
        return TensorPlan(
            {name: style for name, layer in module.named_modules() if (style := _style(name, layer))},
            {n: ("num_heads", "split_size", "embed_dim") for n, m in module.named_modules() if n.endswith(".attn")},
        )


STYLES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), TensorStyle("column")),
    **dict.fromkeys(("o_proj", "down_proj"), TensorStyle("row")),
    **dict.fromkeys(("q_norm", "k_norm"), TensorStyle("shared")),
    "c_attn": TensorStyle("column", blocks=3, transposed=True),
    "c_fc": TensorStyle("column", transposed=True),
    "c_proj": TensorStyle("row", transposed=True),
    "lm_head": TensorStyle("column", gather=True),
}


def _style(name: str, layer: nn.Module) -> TensorStyle | None:
    """Adapters follow the layer they are on: the factor at its cut side is cut as it is, the other stays whole."""
    path = [part for part in name.split(".") if part not in ("base_layer", "default")]
    if "weight" not in layer._parameters:
        return None
    if path[-1] in ("lora_A", "lora_B"):
        style = STYLES[path[-2]]
        return style if (style.kind == "row") == (path[-1] == "lora_A") else None
    return STYLES.get(path[-1])


@dataclass(frozen=True)
class Case:
    """One job: a family under a strategy."""

    family: str = "llama"
    strategy: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    activation_checkpointing: bool = False

    packed: bool = False
    precision: str = "fp32"

    def plan(self) -> Plan:
        """Return the plan of any family; what it is resolved from is a Llama."""
        cut = ("tensor_parallel_size", "sequence_parallel_size")
        tensor, slices = (self.strategy.get(key, 1) for key in cut)
        data = self.ranks // (tensor * slices)
        whole = {key: value for key, value in self.strategy.items() if key not in cut}
        plan = resolve(self._recipe(whole, plain=True))
        return replace(
            plan,
            recipe=self._recipe(self.strategy),
            layout=Layout(data_parallel_size=data, tensor_parallel_size=tensor, sequence_parallel_size=slices),
            gradient_accumulation_steps=BATCH // MICRO // data,
        )

    def _recipe(self, strategy: dict[str, Any], *, plain: bool = False) -> Any:
        return parse(
            {
                "name": "job",
                "model": {"type": "hf", "task": "causal-lm", "tokenizer": {"train": "bpe"}}
                | {"config": {**FAMILIES["llama"], "vocab_size": VOCABULARY}},
                "data": {"type": "text-files", "path": "."},
                "strategy": {"type": "deepspeed", "bucket_size": 5000, "persistence_threshold": 100, **strategy},
                "optim": {"weight_decay": 0.1, "max_grad_norm": LIMIT, "lr": 5e-3, **(self.optim or {"eps": EPSILON})},
                "scaling": {"num_workers": self.ranks},
                "train": {"steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": MICRO, "max_length": LENGTH}
                | {"precision": "fp32" if plain else self.precision},
            }
        )


def batch(step: int, *, packed: bool = False) -> list[Microbatch]:
    """Return a global batch in microbatches, whose numbers of targets differ; padded, or of two documents a sample."""
    random = np.random.default_rng([7, step])
    found = []
    for _ in range(BATCH // MICRO):
        ids = random.integers(0, VOCABULARY, (MICRO, LENGTH))
        ids[:, 1::2] = (ids[:, ::2] + 1) % VOCABULARY
        present = np.arange(LENGTH) < random.integers(4, LENGTH + 1, (MICRO, 1))
        labels, more = np.where(present, ids, -100), {"attention_mask": present.astype(np.int64)}
        if packed:
            start = random.integers(3, LENGTH - 3)
            labels[:, start] = -100
            more = {"position_ids": np.tile(np.r_[np.arange(start), np.arange(LENGTH - start)], (MICRO, 1))}
        found.append(({"input_ids": ids, "labels": labels, **more}, (labels[:, 1:] != -100).sum()))
    targets = sum(count for _, count in found)
    return [Microbatch(features, weight=count / targets, seed=step) for features, count in found]


def lr(step: int) -> float:
    return 5e-3 * min(1, (step + 1) / 4)


def reference(case: Case) -> tuple[list[dict[str, float]], dict[str, np.ndarray], np.ndarray]:
    """Train in plain torch; return what each step measured, the trained weights, and logits of an unseen batch."""
    module = structure(case.family, device="cpu")
    for name, parameter in module.named_parameters():
        parameter.data.copy_(values(case.family)[name])
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = build(case.plan().recipe.optim, parameter_groups(trained, weight_decay=0.1), device_type="cpu")
    rows = []
    for step in range(STEPS):
        loss = torch.zeros((), dtype=torch.float64)
        for microbatch in batch(step, packed=case.packed):
            features = {key: torch.from_numpy(value) for key, value in microbatch.features.items()}
            share = module(**features).loss * microbatch.weight
            share.backward()
            loss += share.detach()
        norm = torch.stack([p.grad.double().norm() for p in trained.values()]).norm()
        for parameter in trained.values():
            parameter.grad *= min(1.0, LIMIT / norm.item())
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[-1]["lr"] = lr(step)
        optimizer.step()
        optimizer.zero_grad()
        rows.append({"loss": loss.item(), "grad_norm": norm.item()})
    return rows, {name: p.detach().numpy() for name, p in trained.items()}, _answers(module, case)


def _answers(module: nn.Module, case: Case) -> np.ndarray:
    """Return the logits of one more microbatch."""
    with torch.no_grad():
        return module(**{key: torch.from_numpy(v) for key, v in unseen(case).features.items()}).logits.numpy()


def unseen(case: Case) -> Microbatch:
    """Return a microbatch that training has not seen, without labels, as long as ranks cannot divide it."""
    features = batch(STEPS, packed=case.packed)[0].features
    return Microbatch({k: np.ascontiguousarray(v[:, :-1]) for k, v in features.items() if k != "labels"}, 1.0, 0)


def engine(case: Case, rank: int, *, module: nn.Module | None = None, weights: Any = None) -> Any:
    """Return the engine under test."""
    plan, module = case.plan(), module or structure(case.family)
    if case.activation_checkpointing:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    strategy = plan.recipe.strategy.build()
    return strategy.engine(module, model=Stand(), weights=weights or reader(case.family), plan=plan, rank=rank)


def reader(family: str) -> Callable[[str], np.ndarray]:
    return lambda name: values(family)[name].numpy()


def train(engine: Any, case: Case, rank: int, *, first: int = 0, last: int = STEPS) -> list[dict[str, float]]:
    """Do the steps of one rank's share of the batches; return what each measured."""
    plan = case.plan()
    each, mine = plan.gradient_accumulation_steps, plan.layout.dp_rank(rank)
    return [
        engine.train_batch(batch(step, packed=case.packed)[mine * each : (mine + 1) * each], lr=lr(step))
        for step in range(first, last)
    ]


def whole(engine: Any) -> dict[tuple[str, str], np.ndarray]:
    """Return every tensor of an engine, each found on exactly one rank."""
    merged: dict[tuple[str, str], np.ndarray] = {}
    mine = {(name, part): value for name, part, value in engine.tensors()}
    for of_rank in engine.gather(mine):
        for key, value in of_rank.items():
            if value is not None:
                assert key not in merged, f"{key} comes from two ranks"
                merged[key] = value
    assert merged.keys() == mine.keys(), "ranks must name the same tensors, and each must come from one of them"
    return merged


def cut_against_whole(family: str, *, rank: int, size: int) -> dict[str, float]:
    """Return how far loss, logits and every gradient of a module cut over all ranks get from those of the uncut one."""
    ids = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    whole, part = structure(family, device="cpu"), structure(family)
    for name, parameter in whole.named_parameters():
        parameter.data.copy_(values(family)[name])
    names = [name for name, _ in part.named_parameters()]
    shares = cut(part, Stand().tensor_plan(part), rank=rank, size=size, group=None)
    materialise(part, reader(family), torch.device("cpu"), shares=shares)
    assert names == [name for name, _ in part.named_parameters()], "a cut must not rename anything"
    expected, found = whole(input_ids=ids, labels=ids), part(input_ids=ids, labels=ids)
    expected.loss.backward()
    found.loss.backward()
    apart = [_apart(p, whole.get_parameter(name), shares.get(name)) for name, p in part.named_parameters()]
    return {
        "loss": abs(found.loss.item() - expected.loss.item()),
        "logits": (found.logits - expected.logits).abs().max().item(),
        "gradients": max(apart),
        "cut": sum(share.dim is not None for share in shares.values()),
    }


def _apart(parameter: nn.Parameter, whole: nn.Parameter, share: Share | None) -> float:
    """Return the largest difference of two gradients, relative to the largest gradient, after the parts are joined."""
    if not parameter.requires_grad:
        return 0.0
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, parameter.grad.numpy())
    joined = share.join(parts) if share else parts[0]
    return float(np.abs(joined - whole.grad.numpy()).max() / np.abs(whole.grad.numpy()).max())
