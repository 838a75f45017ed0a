"""One of two tensor-parallel ranks: runs every family whole and cut, and writes how far apart they are.

python tensor_rank.py RANK RENDEZVOUS_FILE OUTPUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raytx.rendezvous import meet
from raytx_deepspeed.place import materialise
from raytx_deepspeed.tensor import Share, cut
from raytx_hf.adapter import adapted
from raytx_hf.model import LoRA
from raytx_hf.pieces import family
from raytx_hf.tensor_plan import plan_of
from tests.raytx_hf.families import CAUSAL, CLASSIFIERS, model_of, spread

EXPERTS = ("mixtral", "qwen2_moe")
FAMILIES = [name for name in (*CAUSAL, *CLASSIFIERS) if name not in EXPERTS]
BERT = r".*encoder.*\.(query|key|value|dense)"
TARGETS = {  # not the layers of a classifier, which is trained whole
    "bert": BERT,
    "roberta": BERT,
    "distilbert": r".*\.([qkv]_lin|out_lin|lin[12])",
    "t5": r".*\.([qkvo]|wi|wo)",
}
UNTIED = {"tie_word_embeddings": False}
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    **{name: (name, {}, False) for name in FAMILIES},
    **{f"{name} with adapters": (name, {}, True) for name in FAMILIES},
    "raytx_decoder untied": ("raytx_decoder", UNTIED, False),
    "gpt2 untied": ("gpt2", UNTIED, False),
    "llama whose vocabulary does not divide": ("llama", {"vocab_size": 95}, False),
    "t5 gated": ("t5", {"feed_forward_proj": "gated-gelu"}, False),
}
IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 1], [46, 26, 43, 38, 32, 79, 50, 1]])
MASK = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])


def main(rank: int, rendezvous: str, output: str) -> None:
    meeting = meet(f"file://{rendezvous}", backend="gloo", rank=rank, world_size=2, timeout_s=600)
    found = {name: compared(rank, *case) for name, case in CASES.items()}
    if rank == 0:
        Path(output).write_text(json.dumps(found))
    meeting.part()


def compared(rank: int, name: str, changes: dict[str, Any], adapters: bool) -> dict[str, Any]:
    """Return the largest differences of logits and gradients, relative, and how many parameters were cut."""
    whole = _adapted(model_of(name, **changes), "cpu", adapters)
    part = _adapted(model_of(name, device="meta", **changes), "meta", adapters)
    shares = cut(part, plan_of(part), rank=rank, size=2, group=dist.group.WORLD)
    tensors = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    materialise(part, lambda name: tensors[name].detach().numpy(), torch.device("cpu"), shares=shares)
    logits = [_trained(model) for model in (whole, part)]
    return {
        "logits": _apart(logits[1], logits[0]),
        "gradient": _gradient(whole, part, shares),
        "cut": sum(share.dim is not None for share in shares.values()),
        "sizes": [sum(p.numel() for p in model.parameters()) for model in (whole, part)],
    }


def _adapted(model: Any, device: str, adapters: bool) -> Any:
    if not adapters:
        return model
    task = "causal-lm" if model.can_generate() else "sequence-classification"
    with torch.device(device):
        model = adapted(model, LoRA(r=4, target_modules=TARGETS.get(family(model), "all-linear")), task=task)
    return model if device == "meta" else spread(model)


def _trained(model: Any) -> torch.Tensor:
    logits = model(input_ids=IDS, attention_mask=MASK).logits
    (logits * torch.linspace(-1, 1, logits.shape[-1])).tanh().mean().backward()
    return logits.detach()


def _gradient(whole: Any, part: Any, shares: dict[str, Share]) -> float:
    """Return the largest difference of a gradient, beside its largest number or that of all where it is next to 0."""
    parts = dict(part.named_parameters())
    wanted = {name: p.grad for name, p in whole.named_parameters() if p.requires_grad and p.grad is not None}
    least = 1e-3 * max(float(gradient.abs().max()) for gradient in wanted.values())
    return max(_apart(_joined(parts[name], shares.get(name)), gradient, least) for name, gradient in wanted.items())


def _joined(parameter: torch.Tensor, share: Share | None) -> torch.Tensor:
    """Return a gradient made of both ranks' parts; one that is whole on each must be the same on both."""
    parts: list[Any] = [None, None]
    dist.all_gather_object(parts, parameter.grad.numpy())
    if share is None or share.dim is None:
        assert np.array_equal(*parts)
    return torch.from_numpy(parts[0] if share is None else share.join(parts))


def _apart(found: torch.Tensor, wanted: torch.Tensor, least: float = 0.0) -> float:
    return float((found - wanted).abs().max()) / max(float(wanted.abs().max()), least)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
