"""The recipe's words for DeepSpeed ZeRO, and the DeepSpeed JSON they become."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from raytx.components import ModelSize, Shares, StrategyConfig
from raytx.errors import RecipeError
from raytx.layout import Layout
from raytx.optimizer import uncuttable

if TYPE_CHECKING:
    from raytx.plan import Plan
    from raytx.recipe import Recipe


class DeepSpeed(StrategyConfig):
    """DeepSpeed ZeRO: shard optimizer state (1), gradients (2) and parameters (3) over the data-parallel ranks."""

    type: Literal["deepspeed"] = "deepspeed"
    stage: Literal[0, 1, 2, 3] = 2
    """0 shards nothing; 1 optimizer state; 2 gradients too; 3 parameters too (Rajbhandari et al. 2020)."""
    tensor_parallel_size: int = Field(1, gt=0)
    """Ranks that share every layer, each with its part of the heads and widths; they should share a node."""
    sequence_parallel_size: int = Field(1, gt=0)
    """Ranks that share every sample, each with a slice of its tokens, and exchange them for heads around attention
    (Ulysses): for samples whose activations fit no single rank."""
    expert_parallel_size: int = 1
    """Ranks that share the experts of a mixture: 1, as only ZeRO shards them here. DeepSpeed's AutoEP renames and
    splits their weights, and every rank must hold all of them first."""
    offload_optimizer: Literal["cpu", "nvme"] | None = None
    """Where optimizer state and fp32 masters rest, and updates are computed: stages 1 to 3 on the CPU, stage 3 on
    NVMe drives too. Null leaves them on the GPU."""
    offload_param: Literal["cpu", "nvme"] | None = None
    """Stage 3: where parameters rest while no layer needs them. Null leaves them on the GPU."""
    nvme_path: str | None = None
    """Directory on a local drive for what is offloaded to nvme, on every node."""
    bucket_size: int = Field(50_000_000, gt=0)
    """Elements reduced at a time; smaller takes less memory, larger fewer messages."""
    persistence_threshold: int = Field(100_000, ge=0)
    """Stage 3 keeps parameters up to this many elements whole on every rank."""

    @field_validator("expert_parallel_size")
    @classmethod
    def _experts_together(cls, size: int) -> int:
        if size != 1:
            raise ValueError(
                "must be 1: DeepSpeed's AutoEP renames and splits the experts' weights, so a checkpoint would resume "
                "under no other strategy, and each rank must hold all experts first. Use stage 3, which shards them"
            )
        return size

    @model_validator(mode="after")
    def _offloadable(self) -> DeepSpeed:
        if self.offload_param and self.stage < 3:
            raise ValueError(f"offload_param needs stage 3, which shards parameters; stage is {self.stage}")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3; stage 0 keeps torch's optimizer as it is")
        if self.offload_optimizer == "nvme" and self.stage < 3:
            raise ValueError(f"offload_optimizer=nvme needs stage 3, stage is {self.stage}; use cpu")
        if (self.nvme_path is None) == ("nvme" in (self.offload_optimizer, self.offload_param)):
            raise ValueError("nvme_path goes with offload_optimizer=nvme or offload_param=nvme, and they with it")
        return self

    def layout(self, world_size: int) -> Layout:
        ranks, rest = divmod(world_size, self.tensor_parallel_size * self.sequence_parallel_size)
        if rest or not ranks:
            raise RecipeError(
                f"scaling.num_workers={world_size} is no multiple of strategy.tensor_parallel_size="
                f"{self.tensor_parallel_size} x strategy.sequence_parallel_size={self.sequence_parallel_size}"
            )
        return Layout(
            data_parallel_size=ranks,
            tensor_parallel_size=self.tensor_parallel_size,
            sequence_parallel_size=self.sequence_parallel_size,
        )

    def refusal(self, recipe: Recipe) -> str | None:
        precision = recipe.train.precision
        if self.stage == 0 and precision != "fp32":
            return f"stage 0 keeps no fp32 masters under {precision}; use stage 1, or type ddp, which autocasts"
        if self.sequence_parallel_size > 1 and (reason := _unsliceable(recipe)):
            return f"sequence_parallel_size={self.sequence_parallel_size}: {reason}; use 1, or tensor_parallel_size"
        return uncuttable(recipe.optim)

    def misfit(self, recipe: Recipe, layout: Layout, size: ModelSize) -> str | None:
        reason = tensor_misfit(self.tensor_parallel_size, size)
        if reason is None and self.sequence_parallel_size > 1:
            reason = self._heads_misfit(size)
        return reason

    def _heads_misfit(self, size: ModelSize) -> str | None:
        """Ranks that share a sample have a share of the heads in attention, of those that tensor parallelism left."""
        if reason := size.not_sliced or size.not_tensor_parallel:
            return f"sequence_parallel_size={self.sequence_parallel_size}: {reason}; use 1"
        if size.tensor_parallel % (self.sequence_parallel_size * self.tensor_parallel_size):
            return (
                f"sequence_parallel_size={self.sequence_parallel_size} x tensor_parallel_size="
                f"{self.tensor_parallel_size} does not divide the model's heads and widths, whose greatest common "
                f"divisor is {size.tensor_parallel}"
            )
        return None

    def shares(self, layout: Layout) -> Shares:
        tensor, slices = layout.tensor_parallel_size, layout.sequence_parallel_size
        ranks = layout.data_parallel_size * slices
        return Shares(
            parameters=tensor * (ranks if self.stage >= 3 else 1),
            gradients=tensor * (ranks if self.stage >= 2 else 1),
            optimizer=tensor * (ranks if self.stage >= 1 else 1),
            activations=slices,
        )

    def environment(self, *, use_gpu: bool) -> dict[str, str]:
        return {} if use_gpu else {"DS_ACCELERATOR": "cpu"}

    def engine_config(self, plan: Plan) -> dict[str, tuple[Any, str]]:
        """Return DeepSpeed's JSON, each key with the key of the recipe it follows from."""
        train, optim = plan.recipe.train, plan.recipe.optim
        return {
            "train_batch_size": (train.global_batch_size, "train.global_batch_size"),
            "train_micro_batch_size_per_gpu": (train.micro_batch_size, "train.micro_batch_size"),
            "gradient_accumulation_steps": (plan.gradient_accumulation_steps, "derived: global / (micro x ranks)"),
            "gradient_clipping": self._clipping(optim.max_grad_norm),
            **precision_config(train.precision),
            "zero_optimization": (self._zero(), "strategy.stage"),
            "zero_allow_untested_optimizer": (True, "raytx: torch's optimizer, the same under every strategy"),
            "zero_force_ds_cpu_optimizer": (False, "raytx: torch's optimizer, the same under every strategy"),
            "steps_per_print": (2**31 - 1, "raytx: progress is raytx's own"),
        }

    def _clipping(self, limit: float | None) -> tuple[float, str]:
        return (limit or 0.0, "optim.max_grad_norm") if self.stage else (0.0, "raytx: at stage 0 it clips, in fp64")

    def _zero(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"stage": self.stage}
        if self.stage >= 1:
            settings |= {"reduce_bucket_size": self.bucket_size, "allgather_bucket_size": self.bucket_size}
        if self.stage >= 2:
            settings |= {"overlap_comm": False, "contiguous_gradients": True}
        if self.stage >= 3:
            settings |= {"reduce_scatter": True, "stage3_param_persistence_threshold": self.persistence_threshold}
        for key in ("offload_optimizer", "offload_param"):
            if (device := getattr(self, key)) is not None:
                settings[key] = {"device": device} | ({"nvme_path": self.nvme_path} if device == "nvme" else {})
        return settings

    def build(self) -> Any:
        from raytx_deepspeed.engine import DeepSpeedStrategy

        return DeepSpeedStrategy(self)


def _unsliceable(recipe: Recipe) -> str | None:
    """Return why samples of a recipe cannot be cut into slices, or None."""
    if (task := recipe.model.task_class().name) != "causal-lm":
        return f"only causal-lm has slices of samples that add up to its loss, the task is {task}"
    if (kernel := getattr(recipe.model, "attn_implementation", None)) not in (None, "sdpa"):
        return f"it computes attention by sdpa, model.attn_implementation is {kernel}"
    return None


def tensor_misfit(tensor_parallel_size: int, size: ModelSize) -> str | None:
    """Return why a model's layers cannot be cut over so many ranks, or None."""
    if tensor_parallel_size == 1:
        return None
    if size.not_tensor_parallel:
        return f"tensor_parallel_size={tensor_parallel_size} cannot cut this model: {size.not_tensor_parallel}; use 1"
    if size.tensor_parallel % tensor_parallel_size:
        fitting = [n for n in range(1, size.tensor_parallel + 1) if size.tensor_parallel % n == 0]
        return (
            f"tensor_parallel_size={tensor_parallel_size} does not divide the model's heads and widths, whose greatest "
            f"common divisor is {size.tensor_parallel}; use {', '.join(map(str, fitting))}"
        )
    return None


FP16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1}


def precision_config(precision: str) -> dict[str, tuple[Any, str]]:
    """Return DeepSpeed's sections for a precision. fp16 scales the loss dynamically, as loss_scale 0 says: it starts at
    2 ** 16, is halved by every overflow and doubled by 2000 steps without one, as torch.amp does."""
    chosen: dict[str, tuple[Any, str]] = {"bf16": ({"enabled": precision == "bf16"}, "train.precision")}
    if precision == "fp16":
        chosen["fp16"] = (FP16, "train.precision")
    return chosen
