"""The recipe's words for data x pipeline x tensor parallelism, and the DeepSpeed JSON they become."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from raytx.components import ModelSize, Shares, StrategyConfig
from raytx.errors import RecipeError
from raytx.layout import Layout
from raytx.optimizer import uncuttable
from raytx_deepspeed.stages import Stages, balanced, explicit
from raytx_deepspeed.strategy import precision_config

if TYPE_CHECKING:
    from raytx.plan import Plan
    from raytx.recipe import Recipe


class DeepSpeed3D(StrategyConfig):
    """DeepSpeed's pipeline engine: layers in stages, each cut over tensor-parallel ranks, copies over the others."""

    type: Literal["deepspeed-3d"] = "deepspeed-3d"
    pipeline_parallel_size: int = Field(2, gt=0)
    """Stages that the layers are divided among; microbatches pass through them one behind the other."""
    tensor_parallel_size: int = Field(1, gt=0)
    """Ranks that share every layer of a stage; it must divide the model's heads and widths."""
    stage: Literal[0, 1] = 1
    """ZeRO stage: 0 shards nothing; 1 optimizer state over the data-parallel ranks (Rajbhandari et al. 2020)."""
    partition: Literal["parameters", "time"] | tuple[Annotated[int, Field(ge=0)], ...] = "parameters"
    """How layers are shared out: by parameters, by time measured when the run starts, or the first piece of each stage
    ([0, 5, 9]; piece 0 is the embedding, the last one the head)."""
    bucket_size: int = Field(50_000_000, gt=0)
    """Elements reduced at a time; smaller takes less memory, larger fewer messages."""

    @field_validator("stage", mode="before")
    @classmethod
    def _no_sharded_gradients(cls, stage: Any) -> Any:
        if stage in (2, 3):
            raise ValueError(
                f"a pipeline keeps the gradients of its microbatches until the last of them, which stage {stage} would "
                "shard. Allowed: 0, 1; or strategy.type=deepspeed, which has stage 2 and 3 and no pipeline"
            )
        return stage

    @model_validator(mode="after")
    def _one_start_a_stage(self) -> DeepSpeed3D:
        if isinstance(self.partition, str):
            return self
        rising = all(one < other for one, other in pairwise(self.partition))
        if len(self.partition) != self.pipeline_parallel_size or not rising or self.partition[:1] != (0,):
            raise ValueError(
                f"partition={list(self.partition)} must name the first piece of each of {self.pipeline_parallel_size} "
                "stages, in rising order from 0"
            )
        return self

    # ---- what can be carried out

    def layout(self, world_size: int) -> Layout:
        copy = self.pipeline_parallel_size * self.tensor_parallel_size
        data, rest = divmod(world_size, copy)
        if rest or not data:
            near = " or ".join(str(copies * copy) for copies in (data, data + 1) if copies)
            raise RecipeError(
                f"scaling.num_workers={world_size} is no multiple of strategy.pipeline_parallel_size="
                f"{self.pipeline_parallel_size} x strategy.tensor_parallel_size={self.tensor_parallel_size}, the ranks "
                f"of one copy of the model. Use {near} workers"
            )
        return Layout(
            data_parallel_size=data,
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
        )

    def refusal(self, recipe: Recipe) -> str | None:
        return self._refused_task(recipe) or self._refused_precision(recipe) or uncuttable(recipe.optim)

    def _refused_task(self, recipe: Recipe) -> str | None:
        task = recipe.model.task_class().name
        if task != "causal-lm":
            return (
                f"a pipeline trains causal-lm only, model.task is {task}; use type fsdp, or deepspeed with stage 3 or "
                "tensor_parallel_size"
            )
        changing = [step.type for step in recipe.compression if step.changes_training]
        if changing:
            return (
                f"compression {changing[0]!r} changes the whole model before training, of which a stage holds a part "
                "only; use type fsdp or deepspeed"
            )
        return None

    def _refused_precision(self, recipe: Recipe) -> str | None:
        if self.stage == 0 and recipe.train.precision != "fp32":
            return f"stage 0 keeps no fp32 masters under {recipe.train.precision}; use stage 1"
        return None

    def misfit(self, recipe: Recipe, layout: Layout, size: ModelSize) -> str | None:
        return self._unfit_pipeline(size) or self._unfit_tensor(size)

    def _unfit_pipeline(self, size: ModelSize) -> str | None:
        if size.not_pipelined:
            return f"a pipeline cannot cut this model: {size.not_pipelined}"
        pieces = len(size.pieces)
        if self.pipeline_parallel_size > pieces:
            return (
                f"pipeline_parallel_size={self.pipeline_parallel_size} is more than the {pieces} pieces the model is "
                "cut into (embedding, layers, head)"
            )
        if not isinstance(self.partition, str) and self.partition[-1] >= pieces:
            return f"partition={list(self.partition)} names piece {self.partition[-1]}; the model has 0 to {pieces - 1}"
        return None

    def _unfit_tensor(self, size: ModelSize) -> str | None:
        if self.tensor_parallel_size == 1:
            return None
        if size.not_tensor_parallel:
            return f"tensor_parallel_size={self.tensor_parallel_size}: {size.not_tensor_parallel}"
        if size.tensor_parallel % self.tensor_parallel_size:
            allowed = [str(n) for n in range(1, size.tensor_parallel + 1) if size.tensor_parallel % n == 0]
            return (
                f"tensor_parallel_size={self.tensor_parallel_size} does not divide the model's heads and widths. "
                f"Allowed: {', '.join(allowed)}"
            )
        return None

    # ---- what it comes to

    def stages(self, layout: Layout, size: ModelSize) -> Stages:
        """Return the pieces of each stage; with partition=time those of parameters, which the measured ones replace."""
        if isinstance(self.partition, str):
            return balanced(size.pieces, layout.pipeline_parallel_size)
        return explicit(self.partition, len(size.pieces))

    def shares(self, layout: Layout) -> Shares:
        """Return the divisors within a stage; which part of the model that is, the stages say."""
        sharing = layout.data_parallel_size if self.stage == 1 else 1
        cut = layout.tensor_parallel_size
        return Shares(parameters=cut, gradients=cut, optimizer=cut * sharing)

    def environment(self, *, use_gpu: bool) -> dict[str, str]:
        return {} if use_gpu else {"DS_ACCELERATOR": "cpu"}

    def engine_config(self, plan: Plan) -> dict[str, tuple[Any, str]]:
        """Return DeepSpeed's JSON, each key with the key of the recipe it follows from."""
        train = plan.recipe.train
        return {
            "train_batch_size": (train.global_batch_size, "train.global_batch_size"),
            "train_micro_batch_size_per_gpu": (train.micro_batch_size, "train.micro_batch_size"),
            "gradient_accumulation_steps": (plan.gradient_accumulation_steps, "derived: global / (micro x ranks)"),
            "gradient_clipping": (0.0, "raytx: clips by optim.max_grad_norm itself, by the norm in fp64"),
            **precision_config(train.precision),
            "zero_optimization": (self._zero(), "strategy.stage"),
            "pipeline": (
                {"pipe_partitioned": False, "grad_partitioned": False},
                "raytx: activations are sent whole; DeepSpeed's cutting of them assumes one shape",
            ),
            "zero_allow_untested_optimizer": (True, "raytx: torch's optimizers, the same under every strategy"),
            "steps_per_print": (2**31 - 1, "raytx: progress is raytx's own"),
        }

    def _zero(self) -> dict[str, Any]:
        sharding = {"reduce_bucket_size": self.bucket_size, "allgather_bucket_size": self.bucket_size}
        return {"stage": self.stage} | (sharding if self.stage else {})

    def build(self) -> Any:
        from raytx_deepspeed.pipeline import ThreeDStrategy

        return ThreeDStrategy(self)
