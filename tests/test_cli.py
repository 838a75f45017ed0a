"""What a user sees: every mistake ends with one clear message, exit code 2, no traceback and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import yaml

from raytx import cli
from raytx.errors import StoppedError

MODEL = {
    "type": "hf",
    "task": "sequence-classification",
    "config": {
        "model_type": "bert",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 100,
        "max_position_embeddings": 32,
    },
    "tokenizer": {"train": "wordpiece", "vocab_size": 100},
}


@pytest.fixture
def raytx(monkeypatch, capsys):
    """Run the command line in this process; return its exit code and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["raytx", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.fixture
def recipe(tmp_path):
    """Write a valid recipe over a CSV, with changes; return its path."""
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"word{n % 7} thing,{n % 2}\n" for n in range(40)))

    def write(**changes):
        plain = {
            "name": "one",
            "storage_path": str(tmp_path / "runs"),
            "model": MODEL,
            "data": {"type": "files", "path": str(tmp_path / "rows.csv"), "split": {"test": 0.2}},
            "strategy": {"type": "single"},
            "train": {"steps": 2, "global_batch_size": 4, "micro_batch_size": 2, "max_length": 16},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(plain | changes))
        return path

    return write


def refused(result, *words):
    code, text = result
    assert code == 2, text
    assert "Traceback" not in text
    for word in words:
        assert word in " ".join(text.split()), text


def test_an_unknown_key_names_the_nearest(raytx, recipe):
    refused(raytx("plan", recipe(), "optim.learning_rate=1"), "optim.learning_rate: unknown key", "Allowed: type, lr")
    refused(raytx("plan", recipe(), "train.max_lenght=8"), "Did you mean 'max_length'?")


def test_a_wrong_type_says_where_and_what(raytx, recipe):
    refused(raytx("plan", recipe(), "train.steps=many"), "train.steps", "valid integer", "'many'")


def test_every_mistake_is_told_at_once(raytx, recipe):
    result = raytx("plan", recipe(), "train.steps=many", "optim.lr=-1", "scaling.workers=2")
    refused(result, "3 mistakes", "train.steps", "optim.lr", "scaling.workers")


def test_an_unknown_component_names_the_nearest(raytx, recipe):
    refused(raytx("plan", recipe(), "strategy.type=depspeed"), "strategy", "'depspeed'", "Did you mean 'deepspeed'?")


def test_a_missing_file_is_named(raytx, recipe, tmp_path):
    refused(raytx("plan", recipe(), f"data.path={tmp_path}/nowhere.csv"), "no such file", "data.path", "nowhere.csv")
    refused(raytx("train", tmp_path / "nowhere.yaml"), "no such recipe file", "raytx init")


def test_a_missing_column_is_named_with_those_there_are(raytx, recipe, tmp_path):
    result = raytx("train", recipe(), "data.columns={text: review, label: label}")
    refused(result, "'review'", "text")
    assert not (tmp_path / "runs" / "one" / "checkpoints").exists()


def test_a_column_the_task_needs_is_named(raytx, recipe, tmp_path):
    refused(raytx("train", recipe(), "data.columns={text: text}"), "'label'", "sequence-classification")


def test_an_empty_dataset_is_refused(raytx, recipe, tmp_path):
    path = recipe()
    (tmp_path / "rows.csv").write_text("text,label\n")
    code, text = raytx("train", path)
    assert code == 2, text
    assert "Traceback" not in text
    assert not list((tmp_path / "runs" / ".cache").glob("*")) if (tmp_path / "runs" / ".cache").exists() else True


def test_data_without_any_target_is_refused(raytx, recipe, tmp_path):
    path = recipe()
    (tmp_path / "rows.csv").write_text("text,label\n" + "word,\n" * 10)
    refused(raytx("train", path), "label")


def test_a_batch_that_does_not_divide_says_what_would(raytx, recipe):
    refused(raytx("plan", recipe(), "train.global_batch_size=5"), "train.global_batch_size=5", "2 x 1", "Use 4")


def test_a_strategy_that_cannot_use_the_workers_says_so(raytx, recipe):
    refused(raytx("plan", recipe(), "scaling.num_workers=2"), "single", "num_workers is 2")


def test_bf16_under_stage_0_and_a_warmup_longer_than_training_are_refused(raytx, recipe):
    path = recipe(strategy={"type": "deepspeed", "stage": 0})
    refused(raytx("plan", path, "train.precision=bf16"), "stage 0 keeps no fp32 masters", "stage 1")
    refused(raytx("plan", path, "optim.warmup=2"), "optim.warmup=2 steps, but training has 2")


def test_memory_that_does_not_suffice_is_refused_with_both_numbers(raytx, recipe):
    result = raytx("plan", recipe(), "scaling.resources_per_worker={CPU: 1, memory: 1000}")
    refused(result, "bytes", "resources_per_worker.memory is 1,000")


def test_a_directory_that_is_no_artifact_is_refused_before_ray_starts(raytx, tmp_path):
    started = time.monotonic()
    refused(raytx("serve", tmp_path), "not an artifact directory")
    refused(raytx("serve", tmp_path / "nowhere"), "no such directory")
    refused(raytx("export", tmp_path), "neither a run directory nor a checkpoint")
    assert time.monotonic() - started < 20


def test_plan_prints_origins_batch_grid_memory_and_settings(raytx, recipe):
    path = recipe(strategy={"type": "deepspeed", "stage": 1}, scaling={"num_workers": 2})
    code, text = raytx("plan", path, "train.global_batch_size=8")
    assert code == 0, text
    for word in (
        "override",
        "recipe",
        "default",
        "2 accumulation x 2 data-parallel",
        "bytes per rank",
        "train_batch_size",
    ):
        assert word in text
    code, text = raytx("plan", path, "--json")
    plan = json.loads(text)
    assert plan["strategy_settings"]["zero_optimization"]["stage"] == 1
    assert plan["memory"][0]["parameters"] == 4 * plan["size"]["parameters"]


def test_plan_of_an_elastic_run_shows_what_every_size_comes_to_and_which_will_not_do(raytx, recipe):
    path = recipe(strategy={"type": "ddp"}, scaling={"num_workers": [1, 4]}, train={"steps": 2, "max_length": 16})
    sizes = ("train.global_batch_size=8", "train.micro_batch_size=2")
    code, text = raytx("plan", path, *sizes)
    assert code == 0, text
    rows = [line.split()[:3] for line in text.splitlines()]
    for row in (["1", "1", "4"], ["2", "2", "2"], ["4", "4", "1"]):  # workers, data-parallel ranks, accumulation
        assert row in rows
    assert "never on 3: train.global_batch_size=8 is no multiple" in text
    assert "1 to 4 bundles" in text
    plan = json.loads(raytx("plan", path, *sizes, "--json")[1])
    assert plan["recipe"]["scaling"]["num_workers"] == [1, 4]
    assert [row["gradient_accumulation_steps"] for row in plan["elastic"]] == [4, 2, 1]
    assert plan["elastic"][-1]["bytes_per_rank"] == sum(plan["memory"][0].values())
    assert list(plan["unusable"]) == ["3"]
    assert raytx("plan", path, *sizes, "scaling.num_workers=[2, 4]")[1].count("never on") == 1


def test_a_range_of_workers_on_none_of_which_it_runs_is_refused_with_the_nearest(raytx, recipe):
    path = recipe(strategy={"type": "ddp"})
    refused(raytx("plan", path, "scaling.num_workers=[3, 4]"), "On 3:", "would do: 2")
    refused(raytx("plan", path, "scaling.num_workers=[4, 3]"), "[min, max], not [4, 3]")


def test_init_writes_an_example_that_loads_and_never_overwrites(raytx, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text = raytx("init")
    assert code == 0, text
    assert "raytx train quickstart.yaml" in text
    refused(raytx("init"), "quickstart.yaml exists", "--force")
    refused(raytx("init", "quickstrat"), "Did you mean 'quickstart'?", "reviews")
    code, text = raytx("plan", "quickstart.yaml")
    assert code == 0, text


def test_plugins_lists_describes_and_suggests(raytx):
    code, text = raytx("plugins")
    assert code == 0
    for word in ("decoder", "deepspeed", "onnx", "l1-pruning", "text-files"):
        assert word in text
    code, text = raytx("plugins", "strategy", "deepspeed", "--json")
    assert "stage" in {field["name"] for field in json.loads(text)["fields"]}
    refused(raytx("plugins", "strategi"), "Did you mean 'strategy'?")
    refused(raytx("plugins", "strategy", "deepsped"), "Did you mean 'deepspeed'?")


def test_help_and_plugins_need_neither_torch_nor_ray():
    script = (
        "import sys, raytx.cli as c\n"
        "sys.argv = ['raytx', 'plugins']\n"
        "try: c.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets', 'deepspeed', 'onnx'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_runs_are_listed_shown_compared_and_verified(raytx, make_run):
    runs = make_run("one").parent
    make_run("two", optim__lr=0.1)
    code, text = raytx("runs", "list", runs, "--json")
    assert (code, {run["name"]: run["state"] for run in json.loads(text)}) == (
        0,
        {"one": "finished", "two": "finished"},
    )
    code, text = raytx("runs", "show", "one", "--storage-path", runs, "--json")
    assert (code, json.loads(text)["summary"]["name"]) == (0, "one")
    code, text = raytx("runs", "diff", "one", "two", "--storage-path", runs)
    assert code == 0
    assert "optim.lr *" in text
    assert raytx("runs", "verify", "--storage-path", runs)[0] == 0


def test_verify_ends_with_2_and_a_line_for_each_problem(raytx, make_run):
    runs = make_run("one").parent
    (make_run("two") / "artifacts" / "hf" / "model.safetensors").unlink()
    code, text = raytx("runs", "verify", "--storage-path", runs)
    assert code == 2
    assert "  artifacts/hf/model.safetensors: missing\n" in text
    assert raytx("runs", "verify", runs / "one")[0] == 0
    code, text = raytx("runs", "verify", "two", "--storage-path", runs, "--json")
    assert (code, [len(verdict["problems"]) for verdict in json.loads(text)]) == (2, [1])


def test_a_run_that_is_not_there_names_the_nearest(raytx, make_run):
    runs = make_run("quickstart").parent
    refused(raytx("runs", "show", "quikstart", "--storage-path", runs), "no run 'quikstart'", "'quickstart'?")


# ------------------------------------------------------------------------------------------- output that nobody reads


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal():
    master, terminal = os.openpty()
    os.close(master)
    return terminal


@pytest.fixture(params=[closed_pipe, closed_terminal])
def unread(request):
    """A stream that leads to nobody any more."""
    with open(request.param(), "w", buffering=1) as stream:
        yield stream


def test_a_stop_that_has_saved_keeps_its_exit_code_though_nobody_reads_its_last_word(unread, monkeypatch):
    def stopped(**_):
        raise StoppedError("stopped by SIGTERM at step 3, with a checkpoint of it", exit_code=143)

    monkeypatch.setattr(sys, "stderr", unread)
    monkeypatch.setattr(cli, "commands", stopped)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 143


def test_a_command_goes_on_though_nobody_reads_its_output(unread, monkeypatch):
    monkeypatch.setattr(sys, "stdout", unread)
    console = cli._console()
    for step in range(3):
        console.print(f"step {step}")
    print("which Python, too, finds no fault with when it ends", flush=True)
