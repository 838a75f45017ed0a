"""The recipe: what it refuses, in which words, and that YAML, Python and overrides say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytx import recipe
from raytx.errors import RecipeError
from raytx.recipe import Recipe, apply, load, parse, parse_overrides
from raytx.registry import registry
from raytx.sections import Optim, Train
from raytx.testing import FakeEntryPoint, installed
from raytx_torch.strategies import DDP
from raytx_torch.text_files import TextFiles

PLAIN: dict[str, Any] = {
    "name": "small",
    "model": {"type": "decoder", "hidden_size": 64},
    "data": {"type": "text-files"},
    "strategy": {"type": "ddp", "bucket_cap_mb": 5.0},
    "optim": {"lr": 1e-3, "betas": [0.9, 0.95]},
    "export": [{"type": "hf"}, {"type": "onnx", "opset": 18}],
}


def mistakes(changes: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(apply(PLAIN, changes))
    return str(caught.value)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


MINIMAL = "name: small\nmodel: {type: decoder}\ndata: {type: text-files}\n"


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("trian", "train"),
        ("optim.learning_rat", "optim"),
        ("optim.weight_decai", "weight_decay"),
        ("model.hidden_sise", "hidden_size"),
        ("model.tokenizer.vocab_siz", "vocab_size"),
        ("data.split.tset", "test"),
        ("strategy.bucket_cap", "bucket_cap_mb"),
        ("export.1.opest", "opset"),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_the_nearest_name(path: str, near: str) -> None:
    told = mistakes({path: 1})
    assert "1 mistake\n" in told
    assert f"  {path}: unknown key." in told
    assert near in told


def test_an_unknown_key_of_a_component_lists_that_components_own_keys() -> None:
    told = mistakes({"export.1.nonsense": 1})
    assert "Allowed: " in told
    assert "opset" in told.partition("Allowed: ")[2]


def test_a_value_of_the_wrong_type_is_refused_with_what_was_given() -> None:
    assert "optim.lr: input should be a valid number" in mistakes({"optim.lr": "fast"})
    assert "not 'fast'" in mistakes({"optim.lr": "fast"})
    assert "train.steps: input should be greater than 0, not 0" in mistakes({"train.steps": 0})
    assert "evaluate: must be a mapping of keys to values" in mistakes({"evaluate": "often"})
    assert "export: must be a list" in mistakes({"export": {"type": "hf"}})


def test_a_missing_list_item_is_reported_where_it_belongs() -> None:
    assert "optim.betas.1: must be given" in mistakes({"optim.betas": [0.9]})


def test_every_mistake_is_told_at_once() -> None:
    told = mistakes(
        {"optim.lr": -1, "train.epochs": "many", "strategy.type": "dpp", "nam": "x", "export.0.type": "hff"}
    )
    assert told.startswith("recipe: 5 mistakes\n")
    assert len(told.splitlines()) == 6


def test_epochs_and_steps_exclude_each_other() -> None:
    assert "train: give epochs or steps, not both" in mistakes({"train": {"epochs": 1, "steps": 1}})


def test_an_unknown_type_names_the_installed_and_the_nearest() -> None:
    told = mistakes({"strategy.type": "deepsped"})
    assert "strategy: no strategy component of type 'deepsped'" in told
    assert "Did you mean 'deepspeed'?" in told
    assert all(name in told for name in registry().components["strategy"])


def test_an_unknown_type_names_the_plugins_that_could_not_be_loaded() -> None:
    with installed(FakeEntryPoint("lost", ImportError("no module named 'megatron'"))):
        told = mistakes({"strategy.type": "megatron"})
    assert "Plugin 'lost' could not be loaded: ImportError: no module named 'megatron'" in told


def test_a_component_without_a_type_is_told_the_types() -> None:
    assert "data: has no 'type'; allowed: " in mistakes({"data": {"path": "x"}})


@pytest.mark.parametrize("name", ["", "a b", "../up", ".hidden", "x" * 101, "a/b"])
def test_a_name_that_is_no_plain_directory_name_is_refused(name: str) -> None:
    assert "  name: " in mistakes({"name": name})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"storage_path": "~nobody-here/runs"}, "  storage_path: the home directory '~nobody-here' is not known"),
        ({"data": {"type": "text-files", "path": "~nobody-here/x"}}, "  data: path=~nobody-here/x: the home directory"),
        (
            {"model": {"type": "hf", "task": "causal-lm", "path": "~nobody-here/x"}},
            "  model: path=~nobody-here/x: the home directory",
        ),
    ],
)
def test_a_path_in_the_home_of_nobody_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(PLAIN | change)
    assert told in str(caught.value)


def test_a_path_in_ones_own_home_stays_as_it_was_written() -> None:
    assert parse(PLAIN | {"storage_path": "~/runs"}).storage_path == "~/runs"


def test_yaml_and_python_recipes_are_equal_values(tmp_path: Path) -> None:
    text = "train: {steps: 5}\noptim: {lr: 2e-5}\nstrategy: {type: ddp, bucket_cap_mb: 5}\n"
    in_python = Recipe(
        name="small",
        model=registry().find("model", "decoder")(),
        data=TextFiles(),
        strategy=DDP(bucket_cap_mb=5),
        train=Train(steps=5),
        optim=Optim(lr=2e-5),
    )
    assert load(write(tmp_path, MINIMAL + text)) == in_python


def test_a_recipe_dumped_to_yaml_loads_to_an_equal_recipe(tmp_path: Path) -> None:
    whole = parse(PLAIN)
    text = whole.to_yaml()
    assert load(write(tmp_path, text)) == whole
    assert "weight_decay" not in text, "values left at their default are left out"
    assert "type: ddp" in text


def test_text_that_looks_like_a_number_survives_the_dump(tmp_path: Path) -> None:
    whole = parse(PLAIN | {"name": "1e5", "storage_path": "12e3"})
    assert load(write(tmp_path, whole.to_yaml())) == whole


@pytest.mark.parametrize("text", ["2e-5", "2E-5", "2.0e-5", "0.00002", "+2e-05", "2.e-5"])
def test_a_learning_rate_is_a_number_in_every_spelling(tmp_path: Path, text: str) -> None:
    assert load(write(tmp_path, f"{MINIMAL}optim: {{lr: {text}}}\n")).optim.lr == 2e-5
    assert load(write(tmp_path, MINIMAL), [f"optim.lr={text}"]).optim.lr == 2e-5


def test_numbers_in_free_mappings_are_numbers_too(tmp_path: Path) -> None:
    text = "search: {space: {optim.lr: {loguniform: [1e-5, 1e-3]}}}\n"
    search = load(write(tmp_path, MINIMAL + text)).search
    assert search is not None
    assert search.space == {"optim.lr": {"loguniform": [1e-5, 1e-3]}}


def test_a_quoted_text_stays_text(tmp_path: Path) -> None:
    text = MINIMAL.replace("small", "'12e5'")
    assert load(write(tmp_path, text)).name == "12e5"


def test_an_override_replaces_one_value(tmp_path: Path) -> None:
    found = load(write(tmp_path, MINIMAL), ["train.steps=7", "model.tokenizer.vocab_size=300", "name=other"])
    assert (found.name, found.train.steps) == ("other", 7)
    assert found.model.tokenizer.vocab_size == 300  # type: ignore[attr-defined]


def test_overriding_a_type_drops_the_other_components_fields() -> None:
    changed = parse(PLAIN).override({"strategy.type": "deepspeed", "strategy.stage": 3})
    assert changed.strategy.type == "deepspeed"
    assert changed.strategy.stage == 3  # type: ignore[attr-defined]
    assert not hasattr(changed.strategy, "bucket_cap_mb")


def test_the_order_of_overrides_does_not_matter() -> None:
    one = parse(PLAIN).override({"strategy.stage": 3, "strategy.type": "deepspeed"})
    assert one == parse(PLAIN).override({"strategy.type": "deepspeed", "strategy.stage": 3})


def test_overriding_a_type_by_itself_keeps_the_fields() -> None:
    assert parse(PLAIN).override({"strategy.type": "ddp"}) == parse(PLAIN)


def test_list_items_are_overridden_by_index() -> None:
    assert parse(PLAIN).override({"export.1.opset": 20}).export[1].opset == 20  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match="the list has 2 items"):
        parse(PLAIN).override({"export.2.opset": 20})
    with pytest.raises(RecipeError, match=r"is a value .*, not a section"):
        parse(PLAIN).override({"name.first": 1})


@pytest.mark.parametrize("text", ["train.steps", "=3", "optim.lr: 3"])
def test_an_override_without_path_or_value_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"must be key\.path=value"):
        parse_overrides([text])


def test_an_override_does_not_change_the_recipe_it_is_made_from() -> None:
    before = parse(PLAIN)
    before.override({"optim.lr": 1.0, "export.0.type": "onnx"})
    assert before == parse(PLAIN)


def test_aliases_that_expand_to_millions_are_refused(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefg", "bcdefgh", strict=True)]
    with pytest.raises(RecipeError, match=f"expands to more than {recipe.MAX_NODES} values"):
        load(write(tmp_path, "\n".join(lines)))


def test_an_alias_to_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="expands to more than"):
        load(write(tmp_path, "name: &a [*a]"))
    with pytest.raises(RecipeError, match="expands to more than"):
        parse_overrides(["name=&a [*a]"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: [", "not valid YAML"),
        ("name: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("name: a\nname: b", "'name' is given twice"),
        ("[" * 5000, "nested too deeply"),
        ("", "this is empty"),
        ("- a", "this is a list"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_sentence(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load(write(tmp_path, text))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        load(path)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="raytx init"):
        load(tmp_path / "absent.yaml")


def test_a_mistake_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "trian: {}\n")
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: 1 mistake\n")
