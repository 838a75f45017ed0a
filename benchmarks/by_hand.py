"""The same training written directly on each library, without raytx: what its engines are measured against.

Every loop is a generator that does one optimizer update each time it is asked, and yields the global loss. It does what
anybody's own script would do in a step: read the batch from arrays in memory, run its microbatches, clip, set the
learning rate, update, and add up the loss over ranks.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

LR, BETAS, EPS, WEIGHT_DECAY, MAX_NORM = 1e-3, (0.9, 0.95), 1e-8, 0.1, 0.5
BUCKET = 50_000_000


@dataclass(frozen=True)
class Work:
    """What there is to do, the same for both sides."""

    module: Callable[[], nn.Module]
    """Makes the transformers model with its starting weights, whole, on the CPU."""
    features: dict[str, np.ndarray]
    """Of every sample, each (samples, length)."""
    targets: np.ndarray
    """Tokens of each sample that have a loss; (samples,)."""
    order: np.ndarray
    """The samples of each step; (steps, global batch)."""
    micro: int
    """Samples of a microbatch."""
    rank: int
    ranks: int
    """Data-parallel ranks."""

    @property
    def accumulation(self) -> int:
        return self.order.shape[1] // (self.micro * self.ranks)

    def microbatches(self, step: int) -> list[tuple[dict[str, torch.Tensor], float]]:
        """Return this rank's features and their shares of the step's targets."""
        window = self.order[step]
        mine = window.reshape(self.ranks, self.accumulation, self.micro)[self.rank]
        total = self.targets[window].sum()
        return [(self.batch(chosen), float(self.targets[chosen].sum() / total)) for chosen in mine]

    def batch(self, chosen: np.ndarray) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array[chosen]) for name, array in self.features.items()}


Loop = Iterator[float]


# --------------------------------------------------------------------------------------------------------- torch


def torch_ddp(work: Work) -> Loop:
    """torch's DistributedDataParallel."""
    module = DistributedDataParallel(work.module())

    def passes(step: int) -> torch.Tensor:
        *early, last = work.microbatches(step)
        with module.no_sync():
            loss = sum((_backward(module, work, *one) for one in early), torch.zeros(()))
        return loss + _backward(module, work, *last)

    return _torch_loop(module, passes)


def torch_fsdp(work: Work) -> Loop:
    """torch's FSDP2: each layer a unit, and the module around them another."""
    module, mesh = work.module(), init_device_mesh("cpu", (work.ranks,))
    for layer in module.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)

    def passes(step: int) -> torch.Tensor:
        loss = torch.zeros(())
        for place, one in enumerate(work.microbatches(step)):
            module.set_requires_gradient_sync(place == work.accumulation - 1)
            loss += _backward(module, work, *one)
        return loss

    return _torch_loop(module, passes)


def _backward(module: nn.Module, work: Work, features: dict[str, torch.Tensor], weight: float) -> torch.Tensor:
    share = module(**features).loss * weight
    (share * work.ranks).backward()
    return share.detach()


def _torch_loop(module: nn.Module, passes: Callable[[int], torch.Tensor]) -> Loop:
    optimizer = adamw(module)
    for step in itertools.count():
        loss = passes(step)
        norm = nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM)
        (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        set_lr(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss)
        yield loss.item()


def adamw(module: nn.Module) -> torch.optim.AdamW:
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=LR, betas=BETAS, eps=EPS, fused=True)


def set_lr(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] = LR


# ----------------------------------------------------------------------------------------------------- DeepSpeed


def deepspeed_zero(stage: int, work: Work) -> Loop:
    """deepspeed.initialize and its forward, backward, step."""
    import deepspeed

    module = work.module()
    engine, *_ = deepspeed.initialize(model=module, optimizer=adamw(module), config=_settings(work, stage))
    for step in itertools.count():
        loss = torch.zeros(())
        set_lr(engine.optimizer)
        for features, weight in work.microbatches(step):
            share = engine(**features).loss * weight
            engine.backward(share * work.accumulation * work.ranks)
            engine.step()
            loss += share.detach()
        float(engine.get_global_grad_norm())
        dist.all_reduce(loss)
        yield loss.item()


def deepspeed_pipeline(stages: int, work: Work) -> Loop:
    """A PipelineModule of hand-written layers, under ZeRO stage 1."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    whole = work.module()
    around = Around(whole)
    layers = [Embedding(whole), *(Layer(layer, around) for layer in whole.model.layers), Head(whole)]

    def loss_fn(logits: torch.Tensor, target: tuple[torch.Tensor, ...]) -> torch.Tensor:
        labels, weight = target
        shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        mean = nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten())
        return mean * weight * (work.accumulation * work.ranks)

    module = PipelineModule(layers, num_stages=stages, loss_fn=loss_fn, partition_method="parameters")
    engine, *_ = deepspeed.initialize(model=module, optimizer=adamw(module), config=_settings(work, 1))
    for step in itertools.count():
        set_lr(engine.optimizer)
        loss = engine.train_batch(_fed(work, step))
        float(engine.get_global_grad_norm())
        yield loss.item()


def _settings(work: Work, stage: int) -> dict[str, Any]:
    buckets = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET, "overlap_comm": False}
    return {
        "train_micro_batch_size_per_gpu": work.micro,
        "gradient_accumulation_steps": work.accumulation,
        "gradient_clipping": MAX_NORM,
        "zero_optimization": {"stage": stage, **buckets},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
    }


def _fed(work: Work, step: int) -> Iterator[tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]]:
    for features, weight in work.microbatches(step):
        yield (features["input_ids"], features["position_ids"]), (features["labels"], torch.tensor(weight))


class Embedding(nn.Module):
    """(ids, positions) to (hidden states, positions)."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.embed_tokens = whole.model.embed_tokens

    def forward(self, travel: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, positions = travel
        return self.embed_tokens(ids), positions


class Layer(nn.Module):
    """(hidden states, positions) to the same behind one decoder layer."""

    def __init__(self, layer: nn.Module, around: Around) -> None:
        super().__init__()
        self.layer, self.around = layer, around

    def forward(self, travel: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, positions = travel
        mask, rotation = self.around(hidden, positions)
        return self.layer(hidden, attention_mask=mask, position_embeddings=rotation, position_ids=positions), positions


class Around:
    """Mask and rotary angles, made once for all layers of a stage."""

    def __init__(self, whole: Any) -> None:
        self._config, self._rotary = whole.config, whole.model.rotary_emb
        self._of: torch.Tensor | None = None
        self._made: Any = None

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        from transformers.masking_utils import create_causal_mask

        if self._of is not positions:
            given = {"inputs_embeds": hidden, "attention_mask": None, "past_key_values": None}
            mask = create_causal_mask(config=self._config, position_ids=positions, **given)
            self._of, self._made = positions, (mask, self._rotary(hidden, position_ids=positions))
        return self._made


class Head(nn.Module):
    """(hidden states, positions) to logits."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.norm, self.lm_head = whole.model.norm, whole.lm_head

    def forward(self, travel: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self.lm_head(self.norm(travel[0]))


# -------------------------------------------------------------------------------------------- accelerate + Trainer


def trainer(work: Work) -> Loop:
    """transformers' Trainer on accelerate. It owns its loop, so it runs in a thread that waits between two steps."""
    turns: queue.Queue[None] = queue.Queue()
    told: queue.Queue[float | BaseException] = queue.Queue()

    def run() -> None:
        try:
            _train(work, turns, told)
        except BaseException as error:
            told.put(error)

    threading.Thread(target=run, daemon=True).start()
    while True:
        turns.put(None)
        answer = told.get()
        if isinstance(answer, BaseException):
            raise answer
        yield answer


def _train(work: Work, turns: queue.Queue[None], told: queue.Queue[float | BaseException]) -> None:
    from transformers import PrinterCallback, Trainer, TrainerCallback

    class TakeTurns(TrainerCallback):
        def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, float], **rest: Any) -> None:
            if "loss" in logs:
                told.put(logs["loss"])
                turns.get()

    turns.get()
    made = Trainer(
        model=work.module(),
        args=training_arguments(work),
        train_dataset=[int(sample) for sample in work.order.flat],
        data_collator=lambda samples: work.batch(np.asarray(samples)),
        callbacks=[TakeTurns()],
    )
    made.remove_callback(PrinterCallback)
    made.train()


def training_arguments(work: Work) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir="unused",
        max_steps=len(work.order),
        per_device_train_batch_size=work.micro,
        gradient_accumulation_steps=work.accumulation,
        train_sampling_strategy="sequential",
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        optim="adamw_torch_fused",
        max_grad_norm=MAX_NORM,
        use_cpu=True,
        ddp_backend="gloo",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


LOOPS: dict[str, Callable[[Work], Loop]] = {
    "accelerate + Trainer": trainer,
    "torch DDP": torch_ddp,
    "torch FSDP2": torch_fsdp,
    "bare DeepSpeed, stage 1": partial(deepspeed_zero, 1),
    "bare DeepSpeed, stage 2": partial(deepspeed_zero, 2),
    "bare DeepSpeed, stage 3": partial(deepspeed_zero, 3),
    "bare PipelineModule": partial(deepspeed_pipeline, 2),
}
