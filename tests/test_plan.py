"""The plan: arithmetic that adds up, combinations refused with the number that breaks, memory that is true."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from raytx.components import CompressionConfig, DataConfig, ModelConfig, ModelSize, Shares, StrategyConfig
from raytx.errors import PluginError, RecipeError, ResourceError
from raytx.layout import Layout
from raytx.memory import estimate
from raytx.plan import Plan, check_plugins, origins, resolve
from raytx.recipe import Recipe, parse
from raytx.tasks import CausalLM, Task
from raytx.testing import fake_plugin, installed, tiny_recipe

SIZE = ModelSize(parameters=1_000_000, trainable=400_000, layers=2, hidden_size=64, vocab_size=1000)


class PlanModel(ModelConfig):
    """A model of which only the size is known."""

    type: Literal["plan-model"] = "plan-model"
    int8: bool = False
    """Whether it says that it is quantised."""

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"int8"} if self.int8 else {"save_pretrained"})

    def task_class(self) -> type[Task]:
        return CausalLM

    def size(self) -> ModelSize:
        return SIZE


class PlanRows(DataConfig):
    """Rows that are never read."""

    type: Literal["plan-rows"] = "plan-rows"
    path: str | None = None
    """A file."""

    def local_files(self) -> Iterable[tuple[str, str]]:
        return [("path", self.path)] if self.path else []


class Quarters(StrategyConfig):
    """Shards everything over a grid with two pipeline stages."""

    type: Literal["quarters"] = "quarters"
    deep: int = 2
    """Pipeline stages."""

    def layout(self, world_size: int) -> Layout:
        return Layout(data_parallel_size=world_size // self.deep, pipeline_parallel_size=self.deep)

    def shares(self, layout: Layout) -> Shares:
        return Shares(parameters=4, gradients=4, optimizer=4, activations=2)


class Halves(StrategyConfig):
    """Shards everything over all ranks, of which there are not to be too many."""

    type: Literal["halves"] = "halves"
    most: int = 99
    """Ranks it can spread a model over."""

    def misfit(self, recipe: Recipe, layout: Layout, size: ModelSize) -> str | None:
        return f"at most {self.most} ranks" if layout.world_size > self.most else None

    def shares(self, layout: Layout) -> Shares:
        ranks = layout.data_parallel_size
        return Shares(parameters=ranks, gradients=ranks, optimizer=ranks)


class Picky(CompressionConfig):
    """A compression that needs one tag and cannot stand another."""

    type: Literal["picky"] = "picky"
    needs: str = "save_pretrained"
    """A tag."""

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({self.needs})

    @property
    def conflicts(self) -> Mapping[str, str]:
        return {"int8": "it was made small already"}


PLAIN: dict[str, Any] = {
    "name": "small",
    "model": {"type": "plan-model"},
    "data": {"type": "plan-rows"},
    "strategy": {"type": "ddp"},
    "train": {"steps": 100, "global_batch_size": 16, "micro_batch_size": 2, "max_length": 128},
    "scaling": {"num_workers": 4},
}


@pytest.fixture(autouse=True)
def _plugin() -> Iterator[None]:
    with installed(fake_plugin("planned", PlanModel, PlanRows, Quarters, Halves, Picky, version="7.0")):
        yield


def plan(**changes: Any) -> Plan:
    return resolve(parse(PLAIN).override({key.replace("__", "."): value for key, value in changes.items()}))


def test_accumulation_is_what_the_batch_sizes_and_ranks_leave() -> None:
    made = plan()
    assert made.gradient_accumulation_steps == 2
    assert made.layout == Layout(data_parallel_size=4)
    assert made.world_size == 4


@pytest.mark.parametrize(
    ("micro", "workers", "numbers"),
    [
        (3, 4, "16 is no multiple of train.micro_batch_size=3 x 4"),
        (8, 4, "micro_batch_size=8 x 4 data-parallel ranks = 32"),
    ],
)
def test_batches_that_do_not_divide_are_refused_with_the_numbers(micro: int, workers: int, numbers: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(train__micro_batch_size=micro, scaling__num_workers=workers)
    assert numbers in str(caught.value)


def test_only_data_parallel_ranks_share_the_batch() -> None:
    assert plan(strategy={"type": "quarters"}).gradient_accumulation_steps == 4


def test_a_grid_that_is_not_the_number_of_workers_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"runs on 3 workers, scaling.num_workers is 4"):
        plan(strategy={"type": "quarters", "deep": 3})
    with pytest.raises(RecipeError, match="single runs on 1 worker"):
        plan(strategy={"type": "single"})


def test_a_missing_tag_names_who_needs_it() -> None:
    with pytest.raises(
        RecipeError, match="compression 'picky' needs 'layers', which neither model 'plan-model' nor any"
    ):
        plan(compression=[{"type": "picky", "needs": "layers"}])


def test_a_conflict_gives_its_reason() -> None:
    with pytest.raises(RecipeError, match="'picky' does not go with model 'plan-model': it was made small already"):
        plan(model={"type": "plan-model", "int8": True}, compression=[{"type": "picky", "needs": "int8"}])
    plan(compression=[{"type": "picky"}])


def test_every_missing_file_is_named_before_anything_starts(tmp_path: Path) -> None:
    absent = tmp_path / "absent.csv"
    with pytest.raises(RecipeError, match=f"no such file: data.path={absent}"):
        plan(data__path=str(absent))
    absent.touch()
    plan(data__path=str(absent))


def test_the_metric_comes_from_the_task_and_an_unknown_one_is_refused() -> None:
    assert (plan().metric, plan().metric_mode) == ("loss", "min")
    assert plan(evaluate__metric="perplexity").metric == "perplexity"
    with pytest.raises(RecipeError, match=r"'perplexty' is not computed .* Did you mean 'perplexity'\?"):
        plan(evaluate__metric="perplexty")


def test_better_follows_the_mode() -> None:
    assert plan().better(1.0, 2.0)
    assert not plan().better(2.0, 2.0)
    assert plan(evaluate__mode="max").better(2.0, 1.0)
    assert plan().better(9.0, None)


def test_workers_reserve_a_cpu_or_what_the_recipe_says() -> None:
    assert plan().resources_per_worker == {"CPU": 1.0}
    assert plan(scaling__use_gpu=True).resources_per_worker == {"GPU": 1.0}
    wanted = {"CPU": 4, "bandwidth": 1}
    assert plan(scaling__use_gpu=True, scaling__resources_per_worker=wanted).resources_per_worker == wanted | {"GPU": 1}
    with pytest.raises(RecipeError, match="asks for GPU, but"):
        plan(scaling__resources_per_worker={"GPU": 1})


def test_a_rank_that_needs_more_memory_than_it_may_have_is_refused() -> None:
    need = plan().memory[0].total
    plan(save__background=False, scaling__resources_per_worker={"CPU": 1, "memory": need})
    with pytest.raises(ResourceError, match=f"{need:,} bytes of memory, scaling"):
        plan(save__background=False, scaling__resources_per_worker={"CPU": 1, "memory": need - 1})


def test_what_a_rank_holds_for_a_save_in_the_background_counts_on_gpu_workers_too() -> None:
    made = plan()
    held = 12 * made.size.trainable // made.world_size
    need = made.memory[0].total + held
    plan(scaling__resources_per_worker={"CPU": 1, "memory": need})
    with pytest.raises(ResourceError, match=rf"{held:,} of them while a save is written \(none with save.background"):
        plan(scaling__resources_per_worker={"CPU": 1, "memory": need - 1})
    plan(scaling__use_gpu=True, scaling__resources_per_worker={"GPU": 1, "memory": held})
    with pytest.raises(ResourceError, match=f"about {held:,} bytes"):
        plan(scaling__use_gpu=True, scaling__resources_per_worker={"GPU": 1, "memory": held - 1})


# ---- elastic


def elastic(least: int, most: int, **changes: Any) -> Plan:
    return plan(scaling__num_workers=[least, most], **changes)


def test_an_elastic_plan_is_for_the_largest_size_on_which_the_batch_divides() -> None:
    made = elastic(2, 7)  # 16 samples, 2 at a time: 3, 5, 6 and 7 ranks do not divide 8
    assert made.sizes == (2, 4)
    assert made.world_size == 4
    assert made.elastic


def test_on_another_size_the_plan_is_what_it_would_be_for_that_number_of_workers_alone() -> None:
    for strategy in ({"type": "ddp"}, {"type": "quarters"}, {"type": "halves"}):
        made = elastic(2, 8, strategy=strategy)
        for count in made.sizes:
            alone = plan(scaling__num_workers=count, strategy=strategy)
            there = Plan.from_dict(made.to_dict()).on(count)
            for name in ("layout", "gradient_accumulation_steps", "stages", "memory", "size", "resources_per_worker"):
                assert getattr(there, name) == getattr(alone, name), f"{name} on {count}"
            assert there.sizes == made.sizes


def test_the_global_batch_is_the_same_on_every_size() -> None:
    made = elastic(1, 8)
    assert made.sizes == (1, 2, 4, 8)
    for there in map(made.on, made.sizes):
        assert there.gradient_accumulation_steps * 2 * there.layout.data_parallel_size == 16


def test_a_plan_cannot_be_moved_to_a_size_it_does_not_run_on() -> None:
    with pytest.raises(RecipeError, match="3 data-parallel ranks = 6"):
        elastic(2, 4).on(3)


def test_sizes_that_will_not_do_have_their_reasons() -> None:
    reasons = elastic(2, 6, strategy={"type": "quarters"}).unusable()
    assert set(reasons) == {3, 5, 6}
    assert "runs on 2 workers" in reasons[3]
    assert "2 x 3 data-parallel ranks = 6" in reasons[6]


def test_sizes_on_which_a_rank_would_need_too_much_memory_are_left_out() -> None:
    need = plan(scaling__num_workers=4, strategy={"type": "halves"}).memory[0].total
    room = {"save__background": False, "scaling__resources_per_worker": {"CPU": 1, "memory": need}}
    made = elastic(1, 4, strategy={"type": "halves"}, **room)
    assert made.sizes == (4,)
    assert "bytes" in made.unusable()[2]


def test_sizes_that_the_strategy_cannot_spread_the_model_over_are_left_out() -> None:
    made = elastic(1, 4, strategy={"type": "halves", "most": 2})
    assert made.sizes == (1, 2)
    assert made.unusable()[4] == "strategy.type=halves: at most 2 ranks"


def test_a_range_without_a_usable_size_is_refused_with_the_nearest_one_and_what_would_do() -> None:
    with pytest.raises(RecipeError) as caught:
        elastic(5, 7)
    told = str(caught.value)
    assert "scaling.num_workers=[5, 7]" in told
    assert "2 x 7 data-parallel ranks = 14" in told
    assert "The nearest that would do: 4 or 8" in told


def test_a_plan_held_to_its_size_is_not_elastic() -> None:
    made = elastic(2, 4).fixed()
    assert (made.sizes, made.world_size, made.elastic) == ((4,), 4, False)
    assert plan().sizes == (4,)


# ---- the schedule


def rates(**changes: Any) -> list[float]:
    made = plan(optim__lr=1.0, train__steps=10, **changes)
    return [made.lr(step) for step in range(10)]


def test_the_constant_schedule_stays_at_the_peak() -> None:
    assert rates(optim__schedule="constant") == [1.0] * 10


def test_the_linear_schedule_falls_in_equal_steps_towards_zero() -> None:
    assert rates(optim__schedule="linear") == pytest.approx([1 - n / 10 for n in range(10)])


def test_the_cosine_schedule_is_half_a_cosine() -> None:
    assert rates(optim__schedule="cosine") == pytest.approx([(1 + math.cos(math.pi * n / 10)) / 2 for n in range(10)])


@pytest.mark.parametrize("warmup", [4, 0.4])
def test_warm_up_rises_to_the_peak_in_steps_or_in_a_share_of_them(warmup: float) -> None:
    found = rates(optim__schedule="linear", optim__warmup=warmup)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert found[4:] == pytest.approx([1 - n / 6 for n in range(6)])


def test_epochs_become_steps_when_the_data_is_known() -> None:
    made = resolve(parse(PLAIN | {"train": {"epochs": 2.5, "global_batch_size": 16, "micro_batch_size": 2}}))
    assert made.steps is None
    settled = made.with_data(directory=Path("/cache"), num_samples=100)
    assert (settled.steps_per_epoch, settled.steps) == (7, 18)


def test_a_fraction_of_a_tiny_epoch_is_still_a_step() -> None:
    made = resolve(parse(PLAIN | {"train": {"epochs": 0.1, "global_batch_size": 16, "micro_batch_size": 2}}))
    assert made.with_data(directory=Path("/cache"), num_samples=3).steps == 1


# ---- crossing to workers


def test_a_plan_crosses_as_plain_data_to_an_equal_plan() -> None:
    made = elastic(2, 4, compression=[{"type": "picky"}]).with_data(directory=Path("/cache"), num_samples=100)
    assert made.recipe.scaling.num_workers == (2, 4)
    assert Plan.from_dict(made.to_dict()) == made


def test_a_plan_of_an_older_checkpoint_knows_no_other_sizes() -> None:
    data = plan().to_dict()
    del data["sizes"]
    assert not Plan.from_dict(data).elastic


def test_a_worker_with_another_plugin_version_refuses_the_plan() -> None:
    data = plan().to_dict()
    assert data["plugins"]["planned"] == "7.0"
    data["plugins"]["planned"] = "6.9"
    with pytest.raises(PluginError, match=r"plugin 'planned' is 7.0 here and 6.9 in the plan"):
        Plan.from_dict(data)


def test_a_plugin_that_is_not_installed_is_named() -> None:
    with pytest.raises(PluginError, match=r"plugin 'elsewhere' 1.0 is needed, but it is not installed"):
        check_plugins({"elsewhere": "1.0"})


@pytest.mark.parametrize(
    "changes",
    [
        {"scaling__num_workers": 2},
        {"scaling__num_workers": [1, 8]},
        {"strategy": {"type": "quarters"}},
        {"train__activation_checkpointing": True},
        {"evaluate__every": 5},
        {"save__num_to_keep": 9},
        {"export": [{"type": "hf"}]},
        {"name": "other"},
    ],
    ids=str,
)
def test_a_run_may_go_on_with_other_workers_strategy_or_outputs(changes: dict[str, Any]) -> None:
    assert plan(**changes).fingerprint() == plan().fingerprint()


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__lr": 1e-5},
        {"train__global_batch_size": 32},
        {"train__micro_batch_size": 4},
        {"train__seed": 1},
        {"train__precision": "bf16"},
        {"train__steps": 101},
        {"model__int8": True},
    ],
    ids=str,
)
def test_a_run_may_not_go_on_with_what_changes_the_numbers(changes: dict[str, Any]) -> None:
    assert plan(**changes).fingerprint() != plan().fingerprint()


def test_each_value_knows_where_it_came_from() -> None:
    recipe = parse(PLAIN).override({"optim.lr": 1e-5})
    found = origins(recipe, {"optim.lr": 1e-5})
    assert (found["optim.lr"], found["train.steps"], found["train.seed"]) == ("override", "recipe", "default")


# ---- memory


def test_shards_divide_what_a_rank_holds() -> None:
    (whole,), (quarter,) = plan().memory, plan(strategy={"type": "quarters"}).memory
    assert whole.parameters == 4 * quarter.parameters
    assert whole.optimizer == 4 * quarter.optimizer
    assert whole.activations == 2 * quarter.activations
    assert whole.total == whole.parameters + whole.gradients + whole.optimizer + whole.activations


def test_bf16_halves_the_working_copies_and_adds_masters() -> None:
    (full,), (half,) = plan().memory, plan(train__precision="bf16").memory
    assert half.parameters * 2 == full.parameters
    assert half.gradients * 2 == full.gradients
    assert half.optimizer == full.optimizer + 4 * SIZE.trainable


def test_recomputing_activations_saves_memory() -> None:
    assert plan(train__activation_checkpointing=True).memory[0].activations < plan().memory[0].activations


def test_the_estimate_is_the_bytes_that_a_real_model_and_its_optimizer_take(tmp_path: Path) -> None:
    import torch

    config = tiny_recipe().model
    model = config.build()
    model.fit(lambda: iter([{"text": "a few words to learn from"}]), tmp_path, max_length=32)
    module = model.module(tmp_path)
    optimizer = torch.optim.AdamW(module.parameters())
    ids = torch.arange(8)[None]
    module(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    held = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    memory = estimate(
        config.size(), Shares(), micro_batch_size=1, max_length=8, precision="fp32", activation_checkpointing=False
    )
    assert memory.parameters == sum(p.nbytes for p in module.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
    assert memory.optimizer == sum(value.nbytes for value in held)
