"""Every strategy and every family, and the sizes at which the two are tried: what test_parity.py and the docs go by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TOKENIZER = {"train": "bpe", "vocab_size": 320}
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 320,
    "max_position_embeddings": 64,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Family:
    """One architecture at a size that trains in a second, without dropout."""

    name: str
    model: dict[str, Any]
    about: str
    task: str = "causal-lm"


@dataclass(frozen=True)
class Case:
    """A strategy on a number of workers."""

    label: str
    strategy: dict[str, Any]
    workers: int
    everywhere: bool = False
    """Tried with every family, and shown in the docs; the others with the decoder alone."""
    values: dict[str, Any] = field(default_factory=dict)
    """Other values of the recipe that it needs."""


LR = 2e-3
"""At 5e-3 these models amplify rounding: one fp32 process was 1.9e-5 from fp64 within eight steps, at 2e-3 1e-6 within
twenty."""


def hf(model_type: str, task: str = "causal-lm", **config: Any) -> dict[str, Any]:
    return {"type": "hf", "task": task, "config": {"model_type": model_type, **config}, "tokenizer": TOKENIZER}


DECODER = {
    "type": "decoder",
    "tokenizer": TOKENIZER,
    **GROUPED,
}
CLASSIFIER = "sequence-classification"

FAMILIES = [
    Family("decoder", DECODER, "our own; tied embeddings, grouped queries"),
    Family("llama", hf("llama", **GROUPED, tie_word_embeddings=False), "untied"),
    Family("mistral", hf("mistral", **GROUPED, sliding_window=8), "sliding window shorter than the samples"),
    Family("qwen2", hf("qwen2", **GROUPED, tie_word_embeddings=True), "biases, tied"),
    Family("qwen3", hf("qwen3", **GROUPED, head_dim=8), "norms of queries and keys"),
    Family("gemma", hf("gemma", **GROUPED, head_dim=8), "scaled, tied embeddings"),
    Family(
        "gpt2",
        hf(
            "gpt2",
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            vocab_size=320,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
        "learned positions, fused transposed projections, tied",
    ),
    Family("gpt_neox", hf("gpt_neox", **SHAPE), "parallel residual, fused projections, partial rotary"),
    Family(
        "llama LoRA",
        hf("llama", **GROUPED, tie_word_embeddings=False) | {"adapter": {"r": 4, "target_modules": "all-linear"}},
        "adapters on a frozen base",
    ),
    Family(
        "mixtral",
        hf("mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
        "mixture of experts",
    ),
    Family(
        "bert",
        hf("bert", CLASSIFIER, **SHAPE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        "encoder",
        CLASSIFIER,
    ),
    Family(
        "t5",
        hf(
            "t5",
            CLASSIFIER,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            vocab_size=320,
            dropout_rate=0.0,
        ),
        "encoder and decoder, relative positions",
        CLASSIFIER,
    ),
]


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"type": "deepspeed", "stage": stage, **more}


def grid(data: int, pipeline: int, tensor: int, **more: Any) -> Case:
    """A data x pipeline x tensor layout."""
    strategy = {"type": "deepspeed-3d", "pipeline_parallel_size": pipeline, "tensor_parallel_size": tensor, **more}
    label = " ".join([f"3d {data}x{pipeline}x{tensor}", *(f"{key}={value}" for key, value in more.items())])
    return Case(label, strategy, data * pipeline * tensor, everywhere=not more)


CASES = [
    Case("ddp", {"type": "ddp"}, 2, everywhere=True),
    Case("ddp x4", {"type": "ddp"}, 4, values={"train.micro_batch_size": 1}),
    Case("fsdp", {"type": "fsdp"}, 2, everywhere=True),
    Case("fsdp replicas=2", {"type": "fsdp", "replicas": 2}, 4, values={"train.micro_batch_size": 1}),
    Case("fsdp recomputing", {"type": "fsdp"}, 2, values={"train.activation_checkpointing": True}),
    Case("fsdp cpu_offload", {"type": "fsdp", "cpu_offload": True}, 2),
    *(Case(f"zero {stage}", zero(stage), 2, everywhere=True) for stage in range(4)),
    Case("zero 2 x4", zero(2), 4, values={"train.micro_batch_size": 1}),
    *(Case(f"zero {stage} offload_optimizer=cpu", zero(stage, offload_optimizer="cpu"), 2) for stage in (1, 2)),
    Case("zero 3 recomputing", zero(3), 2, values={"train.activation_checkpointing": True}),
    Case("zero 3 offload to cpu", zero(3, offload_optimizer="cpu", offload_param="cpu"), 2),
    Case("zero 1 tensor=2", zero(1, tensor_parallel_size=2), 2, everywhere=True),
    *(Case(f"zero {stage} tensor=2", zero(stage, tensor_parallel_size=2), 2) for stage in (0, 2, 3)),
    *(Case(f"zero {stage} data=2 tensor=2", zero(stage, tensor_parallel_size=2), 4) for stage in (0, 1, 2, 3)),
    *(Case(f"zero {stage} sequence=2", zero(stage, sequence_parallel_size=2), 2) for stage in (1, 3)),
    Case("zero 2 data=2 sequence=2", zero(2, sequence_parallel_size=2), 4),
    grid(1, 1, 1),
    grid(2, 1, 1),
    grid(1, 2, 1),
    grid(1, 1, 2),
    grid(2, 2, 1),
    grid(2, 1, 2),
    grid(1, 2, 2),
    grid(2, 2, 2),
    grid(1, 2, 1, stage=0),
    grid(2, 2, 2, stage=0),
    grid(1, 4, 1, partition=[0, 1, 2, 3]),
    grid(1, 2, 1, partition="time"),
    Case(
        "3d 1x2x1 recomputing",
        {"type": "deepspeed-3d", "pipeline_parallel_size": 2},
        2,
        values={"train.activation_checkpointing": True},
    ),
]
"""Ordered by what they are; the harness groups them by workers, one process group each."""


def values(family: Family, case: Case | None = None) -> dict[str, Any]:
    """Return what sets a family and a case apart from the tiny recipe, as dotted paths."""
    chosen: dict[str, Any] = {"model": family.model, "optim.lr": LR}
    if family.task == CLASSIFIER:
        chosen["data"] = {"type": "files", "columns": {"text": "text", "label": "label"}, "split": {"test": 0.2}}
    if case is not None:
        chosen |= {"strategy": case.strategy, "scaling.num_workers": case.workers, **case.values}
    return chosen


def tried() -> list[tuple[Family, Case]]:
    """Return every pair that is trained, unless the plan refuses it."""
    return [(family, case) for family in FAMILIES for case in CASES if case.everywhere or family is FAMILIES[0]]


def refusal(family: Family, case: Case) -> str | None:
    """Return words that the refusal of a pair must have, or None where it must train."""
    type_, tensor = case.strategy["type"], case.strategy.get("tensor_parallel_size", 1)
    if type_ == "deepspeed-3d" and family.task == CLASSIFIER:
        return "fsdp"
    if tensor > 1 and family.name == "mixtral":
        return "expert"
    return None
