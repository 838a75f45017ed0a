"""Searches: the space is checked first, trials are ordinary runs, the winner is a recipe, a killed search goes on."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raytx import cluster
from raytx.errors import RaytxError, RecipeError, ResourceError
from raytx.recipe import Recipe, load, parse

tune = importlib.import_module("raytx.tune")  # `raytx.tune` itself is the function
Trial = tune.Trial

SPACE: dict[str, Any] = {"optim.lr": {"loguniform": [1e-4, 1e-1]}}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(tmp_path)


def make_recipe(tmp_path: Path, space: dict[str, Any] | None = None, **search: Any) -> Recipe:
    """Return a search over a decoder of one layer, on a few lines of text."""
    texts = tmp_path / "texts"
    texts.mkdir(exist_ok=True)
    for place in range(24):
        (texts / f"{place}.txt").write_text(f"the quick brown fox {place} jumps over the lazy dog\n" * 20)
    return parse(
        {
            "name": "hunt",
            "storage_path": str(tmp_path / "runs"),
            "model": {
                "type": "decoder",
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "intermediate_size": 32,
                "max_position_embeddings": 32,
                "vocab_size": 300,
                "tokenizer": {"train": "bpe", "vocab_size": 300},
            },
            "data": {"type": "text-files", "path": str(texts), "split": {"test": 0.3}},
            "strategy": {"type": "ddp"},
            "train": {"steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "max_length": 16},
            "evaluate": {"every": 2},
            "search": {"space": space or SPACE, "samples": 2, "metric": "loss", **search},
        }
    )


# ------------------------------------------------------------------------------------------------------ the space


@pytest.mark.parametrize(
    ("path", "spec", "expected"),
    [
        ("optim.lrr", {"uniform": [0.1, 0.2]}, r"optim\.lrr: unknown key\. Did you mean 'lr'\?"),
        ("optim.lr", {"uniforn": [0.1, 0.2]}, r"optim\.lr: no sampler 'uniforn'\. Did you mean 'uniform'\?"),
        ("optim.lr", {"uniform": [0.2, 0.1]}, r"optim\.lr: uniform must be \[low, high\]"),
        ("optim.lr", {"uniform": [0.1]}, r"optim\.lr: uniform must be \[low, high\]"),
        ("optim.lr", {"uniform": ["a", "b"]}, r"optim\.lr: uniform must be \[low, high\]"),
        ("optim.lr", {"loguniform": [0, 1]}, r"optim\.lr: loguniform must be \[low, high\] above 0"),
        ("optim.lr", {"quniform": [0.1, 0.2]}, r"optim\.lr: quniform must be \[low, high, step\]"),
        ("train.max_length", {"randint": [8.5, 16]}, r"train\.max_length: randint must be .* whole numbers"),
        ("optim.lr", {"choice": []}, r"optim\.lr: choice must be a list of values"),
        ("optim.lr", {"choice": [0.1], "grid": [0.1]}, r"optim\.lr: must name one sampler"),
        ("optim.lr", {"uniform": [-0.1, 0.1]}, r"optim\.lr: .*greater than 0"),
        ("optim.schedule", {"choice": ["linear", "wavy"]}, r"optim\.schedule: .*'wavy'"),
        ("train.micro_batch_size", {"choice": [2, 3]}, r"train\.micro_batch_size=3"),
        ("scaling.num_workers", {"choice": [1, 2]}, r"scaling\.num_workers: cannot be searched"),
        ("search.samples", {"choice": [1, 2]}, r"search\.samples: cannot be searched"),
    ],
)
def test_a_space_that_cannot_work_is_refused_with_its_path(
    tmp_path: Path, path: str, spec: dict[str, Any], expected: str
) -> None:
    with pytest.raises(RecipeError, match=expected):
        tune.tune(make_recipe(tmp_path, {path: spec}))
    assert not (tmp_path / "runs").exists()


def test_all_mistakes_of_a_space_are_told_at_once(tmp_path: Path) -> None:
    space = {"optim.lrr": {"uniform": [0, 1]}, "train.max_length": {"grid": 4}}
    with pytest.raises(RecipeError) as caught:
        tune.check_space(make_recipe(tmp_path, space))
    assert "optim.lrr: unknown key" in str(caught.value)
    assert "train.max_length: grid must be" in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "allowed"),
    [
        ({"uniform": [0.25, 0.5]}, lambda value: 0.25 <= value <= 0.5),
        ({"loguniform": [1e-4, 1e-2]}, lambda value: 1e-4 <= value <= 1e-2),
        ({"quniform": [0.0, 1.0, 0.25]}, lambda value: value in (0.0, 0.25, 0.5, 0.75, 1.0)),
        ({"randint": [2, 4]}, lambda value: value in (2, 3)),
        ({"choice": ["a", "b"]}, lambda value: value in ("a", "b")),
    ],
)
def test_samplers_draw_what_they_say(spec: dict[str, Any], allowed: Any) -> None:
    drawn = [tune._plain(tune.sampler(spec).sample()) for _ in range(50)]
    assert all(allowed(value) for value in drawn)
    assert len(set(drawn)) > 1
    assert all(type(value) in (int, float, str) for value in drawn)


def test_a_grid_is_tried_whole() -> None:
    assert tune.sampler({"grid": [1, 2, 3]}) == {"grid_search": [1, 2, 3]}


def test_asha_without_evaluations_to_compare_is_refused(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"Set evaluate\.every, or search\.scheduler=fifo"):
        tune.tune(recipe.override({"evaluate.every": None}))


def test_a_metric_the_task_does_not_compute_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'los' is not computed by task .*Did you mean 'loss'\?"):
        tune.tune(make_recipe(tmp_path, metric="los"))


def test_a_recipe_without_a_search_is_refused(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="search: must be given"):
        tune.tune(recipe.override({"search": None}))


# ----------------------------------------------------------------------------------------------------- the trials


def test_a_trial_is_an_ordinary_run_without_exports_that_chooses_by_the_searchs_metric(tmp_path: Path) -> None:
    search = make_recipe(tmp_path, metric="perplexity").override({"export": [{"type": "hf"}]})
    trial = tune.trial_recipe(search, {"optim.lr": 0.5}, "trial_00003", tmp_path / "trials")
    assert (trial.name, trial.storage_path) == ("trial_00003", str(tmp_path / "trials"))
    assert (trial.optim.lr, trial.export, trial.search) == (0.5, (), None)
    assert trial.evaluate.metric == "perplexity"


def test_concurrency_is_what_the_cluster_holds_and_never_more_than_asked(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"CPU": 4.0, cluster.DRIVER: 1000.0}]
    monkeypatch.setattr(cluster, "free", lambda: nodes)
    monkeypatch.setattr(cluster, "wait_for", lambda *args, **kwargs: None)
    driver = tune._driver(nodes)
    assert driver == {cluster.DRIVER: 1.0}
    two_workers = tune.Search(recipe.override({"scaling.num_workers": 2}))
    assert two_workers._concurrent(driver, Console(quiet=True)) == 2
    one_at_once = tune.Search(recipe.override({"search.max_concurrent": 1}))
    assert one_at_once._concurrent(driver, Console(quiet=True)) == 1


def test_trials_of_an_elastic_recipe_run_on_its_largest_size_and_the_winner_stays_elastic(recipe: Recipe) -> None:
    search = tune.Search(recipe.override({"scaling.num_workers": [1, 2]}))
    assert (search.plan.world_size, search.plan.elastic) == (2, False)
    assert search.recipe.scaling.elastic


def test_a_cluster_whose_cpus_are_all_needed_by_workers_cannot_hold_drivers(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "free", lambda: [{"CPU": 1.0}])
    monkeypatch.setattr(cluster, "wait_for", lambda *args, **kwargs: None)
    with pytest.raises(ResourceError, match=cluster.DRIVER):
        tune.Search(recipe)._concurrent(tune._driver([{"CPU": 1.0}]), Console(quiet=True))


def test_the_winner_ran_to_its_end_and_has_the_best_number() -> None:
    trials = [
        Trial("a", {}, "stopped", metrics={"loss": 0.1}),
        Trial("b", {}, "finished", metrics={"loss": 0.3}),
        Trial("c", {}, "finished", metrics={"loss": 0.2}),
        Trial("d", {}, "finished", metrics={"loss": math.nan}),
        Trial("e", {}, "failed", error="out of memory"),
    ]
    for mode, order in (("min", "cbdae"), ("max", "bcdae")):
        ranked = sorted(trials, key=lambda trial: tune._rank(trial, metric="loss", mode=mode))
        assert "".join(trial.id for trial in ranked) == order


def test_what_a_trial_left_in_its_directory_tells_how_it_ended(recipe: Recipe) -> None:
    search, heard = tune.Search(recipe), {"loss": 0.5, "step": 3}
    directory = search.trials_dir / "t"
    directory.mkdir(parents=True)
    assert search.trial("t", {}, "RUNNING", heard) == Trial("t", {}, "running", 2, {"loss": 0.5})
    assert search.trial("t", {}, "TERMINATED", heard) == Trial("t", {}, "stopped", 2, {"loss": 0.5})
    (directory / "trial.json").write_text('{"error": "the actor died"}')
    assert search.trial("t", {}, "TERMINATED", heard) == Trial("t", {}, "stopped", 2, {"loss": 0.5})
    assert search.trial("t", {}, "ERROR", heard) == Trial("t", {}, "failed", 2, {"loss": 0.5}, "the actor died")
    (directory / "trial.json").write_text('{"metrics": {"loss": 0.25}, "steps": 6}')
    assert search.trial("t", {}, "TERMINATED", heard) == Trial("t", {}, "finished", 3, {"loss": 0.25})


def test_a_search_whose_trials_all_failed_says_why(recipe: Recipe) -> None:
    with pytest.raises(RaytxError, match="a: out of memory"):
        tune.Search(recipe)._finish([Trial("a", {}, "failed", error="out of memory")])


# -------------------------------------------------------------------------------------------------------- going on


def begun(recipe: Recipe) -> Path:
    """Leave the directory of a search that was begun."""
    directory = Path(recipe.storage_path) / recipe.name
    (directory / "tune").mkdir(parents=True)
    (directory / "recipe.yaml").write_text(recipe.to_yaml())
    return directory


def test_another_search_of_the_same_name_is_refused_with_the_keys(recipe: Recipe) -> None:
    begun(recipe)
    other = recipe.override({"train.steps": 8, "search.samples": 9})
    with pytest.raises(RecipeError, match=r"(?s)search\.samples: 2 in the search, 9 now.*another name") as caught:
        tune.tune(other)
    assert "train.steps: 6 in the search, 8 now" in str(caught.value)


@pytest.mark.parametrize("searches_too", [False, True])
def test_a_training_run_of_the_same_name_is_refused(recipe: Recipe, searches_too: bool) -> None:
    """Whether or not the recipe that was trained has a search in it, which training ignores."""
    directory = Path(recipe.storage_path) / recipe.name
    directory.mkdir(parents=True)
    (directory / "plan.json").write_text("{}")
    (directory / "recipe.yaml").write_text((recipe if searches_too else recipe.override({"search": None})).to_yaml())
    with pytest.raises(RecipeError, match=r"'hunt' in .* is a training run; give the search another name"):
        tune.tune(recipe)


def test_a_second_search_in_the_same_directory_is_refused_while_the_first_goes_on(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connect", lambda *args, **kwargs: None)
    monkeypatch.setattr(tune.Search, "run", lambda *args: tune.tune(recipe))  # the second, from within the first
    with pytest.raises(ResourceError, match=r"'hunt' is in use by another process"):
        tune.tune(recipe)


def test_a_directory_that_cannot_be_made_is_one_clear_error(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connect", lambda *args, **kwargs: pytest.fail("Ray was started"))
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        with pytest.raises(ResourceError, match="storage_path: cannot write"):
            tune.tune(recipe.override({"storage_path": str(tmp_path / place)}))


def test_a_search_may_go_on_in_another_place_with_other_workers(recipe: Recipe) -> None:
    begun(recipe)
    tune.Search(recipe.override({"scaling.num_workers": 2, "search.max_concurrent": 1, "scaling.wait_s": 5})).check()


@pytest.mark.parametrize("mode", [0o666, 0o620])
def test_a_search_whose_state_others_can_write_is_not_unpickled(
    recipe: Recipe, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = begun(recipe) / "tune" / "tuner.pkl"
    state.write_bytes(b"")
    state.chmod(mode)
    monkeypatch.setattr(tune.ray_tune.Tuner, "can_restore", lambda path: True)
    monkeypatch.setattr(tune.ray_tune.Tuner, "restore", lambda *args, **kwargs: pytest.fail("it was read"))
    with pytest.raises(RaytxError, match=r"tuner\.pkl can be written by other users"):
        tune.Search(recipe)._restored(None, Console(quiet=True))


SEARCH = """
import sys
from rich.console import Console
from raytx import cluster
from raytx.tune import tune
cluster.connect(num_cpus=2)
tune(sys.argv[1], console=Console(width=200))
"""


def search(path: Path, home: Path) -> subprocess.Popen[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-c", SEARCH, str(path)],
        env=kept | {"HOME": str(home), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_killed_search_goes_on_and_its_winner_is_a_recipe_that_loads(tmp_path: Path) -> None:
    """Kill a search when its first trial is done, run it again to its end, and once more when nothing is left to do."""
    recipe = make_recipe(tmp_path, samples=2, max_concurrent=1, grace_period=2, reduction_factor=2)
    path, directory = tmp_path / "hunt.yaml", tmp_path / "runs" / "hunt"
    path.write_text(recipe.to_yaml())
    first = search(path, tmp_path)
    done = directory / "trials" / "trial_00000" / "trial.json"
    deadline = time.monotonic() + 180
    while not done.is_file() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(6)  # Tune writes its state every five seconds
    os.killpg(first.pid, signal.SIGKILL)
    text, _ = first.communicate()
    assert done.is_file(), text
    assert not (directory / "trials.json").is_file()
    written = done.stat().st_mtime_ns

    second = search(path, tmp_path)
    text, _ = second.communicate(timeout=300)
    assert second.returncode == 0, text
    assert "going on with the search" in text
    assert done.stat().st_mtime_ns == written
    trials = json.loads((directory / "trials.json").read_text())
    assert [trial["id"] for trial in trials] == ["trial_00000", "trial_00001"]
    assert {trial["state"] for trial in trials} <= {"finished", "stopped"}
    for trial in trials:
        assert load(directory / "trials" / trial["id"] / "recipe.yaml").optim.lr == trial["values"]["optim.lr"]
    with open(directory / "trials.csv", newline="") as file:
        assert [float(row["optim.lr"]) for row in csv.DictReader(file)] == [t["values"]["optim.lr"] for t in trials]

    best = load(directory / "best.yaml")
    finished = [trial for trial in trials if trial["state"] == "finished"]
    winner = min(finished, key=lambda trial: trial["metrics"]["loss"])
    assert (best.name, best.search, best.storage_path) == ("hunt-best", None, str(tmp_path / "runs"))
    assert best.optim.lr == winner["values"]["optim.lr"]
    assert f"raytx train {directory / 'best.yaml'}" in text

    third = search(path, tmp_path)
    shown, _ = third.communicate(timeout=100)
    assert f"best: loss {winner['metrics']['loss']:.6g}" in shown
    assert "going on" not in shown
