"""The recipe's own sections: how to optimise, train, evaluate, save, scale, search and serve."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SEEDS = 2**32
"""NumPy and torch take seeds below this."""
WORKERS = 10_000
"""More workers are a slip of the finger; every size up to the largest is tried when a plan is made."""


class Section(BaseModel):
    """A frozen part of a recipe in which every key is known and every number is finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def _chosen(self, name: str) -> bool:
        """Tell a value that was chosen; model_fields_set would not do, as a plan's recipe has every field set."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)


IDLE_UNLESS: dict[str, tuple[str, tuple[str, ...]]] = {
    "betas": ("type", ("adamw", "adamw_8bit")),
    "eps": ("type", ("adamw", "adamw_8bit", "adafactor")),
    "beta2_decay": ("type", ("adafactor",)),
    "momentum": ("type", ("sgd",)),
    "nesterov": ("type", ("sgd",)),
    "fused": ("type", ("adamw",)),
    "min_lr_ratio": ("schedule", ("linear", "cosine", "wsd")),
    "decay": ("schedule", ("wsd",)),
}
"""Settings of an optimizer that do nothing unless another has one of these values."""


class Optim(Section):
    """The optimizer and its learning-rate schedule. Weight decay skips norms and biases."""

    type: Literal["adamw", "sgd", "adafactor", "adamw_8bit"] = "adamw"
    """Optimizer: AdamW (Loshchilov and Hutter 2019); sgd; adafactor, which keeps a row and a column of a matrix's
    second moments (Shazeer and Stern 2018); adamw_8bit, AdamW with moments of one byte (Dettmers et al. 2022)."""
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate. Under adafactor the largest step relative to a parameter's size, for which 1e-2 is usual."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of matrices and embeddings; parameters of one dimension get none. Decoupled from the gradient,
    except under sgd, whose momentum takes it in."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """adamw and adamw_8bit: decay rates of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """adamw and adamw_8bit: added to the denominator of the update; adafactor: its least value."""
    beta2_decay: float = Field(-0.8, le=0)
    """adafactor: the second moment's decay rate at step t is 1 - t ** beta2_decay."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """sgd: share of the last update that is kept; 0 keeps no state."""
    nesterov: bool = False
    """sgd: look ahead by one step of the momentum."""
    fused: bool | None = None
    """adamw: one kernel for the whole update; null takes it wherever torch has it. The numbers agree to rounding."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "linear"
    """Shape of the learning rate after warm-up: flat; falling until the last step; wsd, flat and falling at the end;
    or falling with the root of the steps."""
    warmup: Annotated[float, Field(ge=0)] = 0.0
    """Steps of linear warm-up; below 1 it is a share of all steps."""
    min_lr_ratio: float = Field(0.0, ge=0, lt=1)
    """linear, cosine and wsd: share of the peak that they fall to."""
    decay: Annotated[float, Field(gt=0)] = 0.1
    """wsd: steps at the end that fall; below 1 it is a share of all steps."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this global L2 norm; null turns clipping off."""

    @field_validator("warmup", "decay")
    @classmethod
    def _whole_steps(cls, amount: float) -> float:
        if amount > 1 and amount != int(amount):
            raise ValueError("must be a share of all steps below 1, or a whole number of steps")
        return amount

    @model_validator(mode="after")
    def _nothing_idle(self) -> Optim:
        for name, (key, readers) in IDLE_UNLESS.items():
            if self._chosen(name) and getattr(self, key) not in readers:
                raise ValueError(
                    f"{name} would do nothing: {key} {getattr(self, key)} does not read it, only {_either(readers)}"
                )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Optim:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov looks ahead along the momentum, which is 0; 0.9 is usual")
        if self.schedule == "wsd" and max(self.warmup, self.decay) < 1 < self.warmup + self.decay:
            raise ValueError(f"warmup={self.warmup:g} and decay={self.decay:g} are more than all steps together")
        return self


def _either(words: tuple[str, ...]) -> str:
    return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


class Train(Section):
    """How long, in what batches and in what precision to train."""

    epochs: float | None = Field(None, gt=0, le=1e6)
    """Passes over the data; one when neither epochs nor steps is given."""
    steps: int | None = Field(None, gt=0, lt=10**9)
    """Optimizer updates, instead of epochs."""
    global_batch_size: int = Field(32, gt=0)
    """Samples of one optimizer update, over all workers. The numbers depend on this, never on the workers."""
    micro_batch_size: int = Field(8, gt=0)
    """Samples of one forward and backward pass on one worker; accumulation is derived from it."""
    max_length: int = Field(512, gt=1)
    """Tokens of one sample at most."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of forward and backward; master weights and moments stay fp32. fp16 scales the loss dynamically
    and needs scaling.use_gpu."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    seed: int = Field(0, ge=0, lt=SEEDS)
    """Seeds initial weights, data order, dropout, and whatever a model or task draws from Python, NumPy or torch."""
    max_nonfinite: int = Field(0, ge=0)
    """Steps of a run whose loss or gradient norm is not finite that are left out, as if they had not been; one more
    stops it. Each is told with its samples."""
    ledger: bool = False
    """Write the samples of every step into ledger.jsonl, to audit that each is seen exactly once an epoch."""

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        return self


class Evaluate(Section):
    """When to measure the held-out split, and by which metric the best checkpoint is chosen."""

    every: int | None = Field(None, gt=0)
    """Steps between evaluations; null evaluates at the end only."""
    metric: str | None = None
    """Metric that says which checkpoint is best; null takes the task's own (loss, accuracy...)."""
    mode: Literal["min", "max"] | None = None
    """Whether less or more of the metric is better; null takes what the task knows of it."""
    max_samples: int | None = Field(None, gt=0)
    """Samples of the held-out split used; null uses all."""


class Save(Section):
    """When to commit a checkpoint, and which ones stay."""

    every: int | None = Field(None, gt=0)
    """Steps between checkpoints; null saves at the end only. The last step is always saved."""
    num_to_keep: int | None = Field(2, gt=0)
    """Newest checkpoints that stay; the best one stays besides. Null keeps all."""
    keep: Literal["last", "best"] = "last"
    """Which checkpoint becomes the artifact."""
    background: bool = True
    """Training goes on while a checkpoint is written, from a copy in host memory: 12 bytes a trained parameter under
    adamw, shared among the ranks. False makes no copy, and training waits until the checkpoint is committed."""


Count = Annotated[int, Field(gt=0, le=WORKERS)]


class Scaling(Section):
    """The Ray workers: how many, with what, and how often they may fail. The words are Ray's."""

    num_workers: Count | tuple[Count, Count] = 1
    """Ray Train workers, one process and rank each. [min, max] makes the run elastic: it starts with what there is,
    goes on with fewer when nodes are lost and with more when nodes come, and learns the same with any number."""
    use_gpu: bool = False
    """One GPU for each worker."""
    resources_per_worker: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """What each worker reserves; null reserves one CPU, or one GPU with use_gpu. "memory" is in bytes."""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray spreads the workers over nodes."""
    max_failures: int = Field(3, ge=0)
    """Restarts from the newest checkpoint after a worker died; three errors in a row at one step end the run anyway."""
    wait_s: float = Field(120, gt=0)
    """Seconds to wait for the cluster to have room before giving up."""
    threads_per_worker: int = Field(1, gt=0)
    """CPU threads of each worker (OMP_NUM_THREADS)."""
    stall_s: float | None = Field(30, gt=0)
    """Seconds without any progress after which the missing rank is named, every rank's stack shown and all are
    restarted; at least five times the usual step, and twenty times as much while starting or saving. Null waits on."""
    grace_s: float = Field(30, gt=0)
    """Seconds that ranks have to save when the run is told to end (Ctrl-C, SIGTERM, a job's stop)."""

    @field_validator("num_workers", mode="before")
    @classmethod
    def _number_or_range(cls, given: Any) -> Any:
        several = isinstance(given, list | tuple)
        bounds = tuple(given) if several else (given, given)
        whole = len(bounds) == 2 and all(type(bound) is int and 0 < bound <= WORKERS for bound in bounds)
        if not whole or bounds[0] > bounds[1]:
            shown = f", not {list(given)}" if several else ""
            raise ValueError(f"must be a whole number from 1 to {WORKERS}, or two as [min, max]{shown}")
        return bounds if several else given

    @property
    def elastic(self) -> bool:
        return not isinstance(self.num_workers, int)

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class Search(Section):
    """A Ray Tune search over values of the recipe."""

    space: dict[str, dict[str, Any]] = Field(min_length=1)
    """Recipe path to sampler: {optim.lr: {loguniform: [1.0e-5, 1.0e-3]}}; samplers are uniform, loguniform,
    quniform, randint, choice and grid."""
    samples: int = Field(8, gt=0)
    """Trials drawn (times the grid, where there is one)."""
    metric: str | None = None
    """What trials compete for; null takes evaluate.metric or the task's own."""
    mode: Literal["min", "max"] | None = None
    """Whether less or more is better; null takes what the task knows of the metric."""
    scheduler: Literal["asha", "fifo"] = "asha"
    """asha stops weak trials early (Li et al. 2020); fifo lets every trial finish."""
    grace_period: int = Field(1, gt=0)
    """Evaluations every trial may do before asha can stop it."""
    reduction_factor: int = Field(3, gt=1)
    """asha keeps one in this many at each rung."""
    max_concurrent: int | None = Field(None, gt=0)
    """Trials at once; null takes what the cluster holds."""
    seed: int = Field(0, ge=0, lt=SEEDS)
    """Seeds the sampling of the space."""

    @model_validator(mode="after")
    def _asha_only(self) -> Search:
        idle = [name for name in ("grace_period", "reduction_factor") if self._chosen(name)]
        if self.scheduler == "fifo" and idle:
            raise ValueError(f"{' and '.join(idle)} would do nothing: scheduler fifo lets every trial finish")
        return self


class Serving(Section):
    """The Ray Serve application that `raytx serve` starts."""

    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback must be asked for here or by --host."""
    port: int = Field(8000, gt=0, lt=65536)
    """Port to listen on."""
    num_replicas: int = Field(1, gt=0)
    """Processes that hold the model."""
    use_gpu: bool = False
    """One GPU for each replica."""
    max_batch_size: int = Field(8, gt=0)
    """Requests answered by one forward pass."""
    batch_wait_s: float = Field(0.01, ge=0)
    """Seconds a request waits for others to fill its batch, the time that it waited for the model included."""
    max_ongoing_requests: int = Field(16, gt=0)
    """Answers a replica streams at once; for whole answers, places in it beside those of max_queued_requests."""
    cpus_per_replica: int = Field(1, gt=0)
    """CPUs each replica reserves and threads it computes with."""
    max_queued_requests: int = Field(64, gt=0)
    """Requests that may wait beyond those the replicas have places for; more are answered 503 at once."""
    max_wait_s: float | None = Field(None, gt=0)
    """Seconds a request may be expected to wait; more is answered 503 at once. By default what timeout_s leaves."""
    max_tokens: int = Field(1024, gt=0)
    """Tokens a completion may ask for."""
    max_body_bytes: int = Field(1_000_000, gt=0)
    """Bytes of a request body; more is answered 413."""
    timeout_s: float = Field(60, gt=0)
    """Seconds a request may take."""
