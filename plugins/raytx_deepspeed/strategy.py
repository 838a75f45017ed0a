"""The recipe's words for DeepSpeed ZeRO, and the DeepSpeed JSON they become."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from raytx.components import Shares, StrategyConfig
from raytx.layout import Layout

if TYPE_CHECKING:
    from raytx.plan import Plan
    from raytx.recipe import Recipe


class DeepSpeed(StrategyConfig):
    """DeepSpeed ZeRO: shard optimizer state (1), gradients (2) and parameters (3) over the data-parallel ranks."""

    type: Literal["deepspeed"] = "deepspeed"
    stage: Literal[0, 1, 2, 3] = 2
    """0 shards nothing; 1 optimizer state; 2 gradients too; 3 parameters too (Rajbhandari et al. 2020)."""
    bucket_size: int = Field(50_000_000, gt=0)
    """Elements reduced at a time; smaller takes less memory, larger fewer messages."""
    persistence_threshold: int = Field(100_000, ge=0)
    """Stage 3 keeps parameters up to this many elements whole on every rank."""

    def refusal(self, recipe: Recipe) -> str | None:
        if self.stage == 0 and recipe.train.precision == "bf16":
            return "stage 0 keeps no fp32 masters under bf16; use stage 1, or type ddp, which autocasts"
        return None

    def shares(self, layout: Layout) -> Shares:
        ranks = layout.data_parallel_size
        return Shares(
            parameters=ranks if self.stage >= 3 else 1,
            gradients=ranks if self.stage >= 2 else 1,
            optimizer=ranks if self.stage >= 1 else 1,
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
            "gradient_clipping": (optim.max_grad_norm or 0.0, "optim.max_grad_norm"),
            "bf16": ({"enabled": train.precision == "bf16"}, "train.precision"),
            "zero_optimization": (self._zero(), "strategy.stage"),
            "zero_allow_untested_optimizer": (True, "raytx: torch's AdamW, the same under every strategy"),
            "zero_force_ds_cpu_optimizer": (False, "raytx: torch's AdamW, the same under every strategy"),
            "steps_per_print": (2**31 - 1, "raytx: progress is raytx's own"),
        }

    def _zero(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"stage": self.stage}
        if self.stage >= 1:
            settings |= {"reduce_bucket_size": self.bucket_size, "allgather_bucket_size": self.bucket_size}
        if self.stage >= 2:
            settings |= {"overlap_comm": False, "contiguous_gradients": True}
        if self.stage >= 3:
            settings |= {"stage3_param_persistence_threshold": self.persistence_threshold}
        return settings

    def build(self) -> Any:
        from raytx_deepspeed.engine import DeepSpeedStrategy

        return DeepSpeedStrategy(self)
