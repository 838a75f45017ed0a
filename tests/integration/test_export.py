"""What is served is what was trained: every form is replayed against golden outputs, or refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from raytx import artifact, checkpoint, worker
from raytx.artifact import GOLDEN, Golden, open_artifact
from raytx.checkpoint import Checkpoint
from raytx.errors import ArtifactError, CheckpointError, RecipeError
from raytx.export import export, published
from raytx.files import inventory, read_json, read_sealed, write_json, write_sealed
from raytx.plan import Plan, resolve
from raytx.prepare import prepare

FORMS = [{"type": "hf"}, {"type": "onnx"}]


def trained(recipe):
    """Train in this process; return the run directory and what was logged."""
    plan, _ = prepare(resolve(recipe), Console(quiet=True))
    log = []
    worker.train(plan, worker.Session(rank=0, log=log.append, flush=lambda: None, report=lambda metrics: None))
    return plan.run_dir, log


@pytest.fixture(scope="module")
def run_dir(recipe):
    return trained(recipe("exported", train__steps=12, export=FORMS))[0]


@pytest.fixture(scope="module")
def artifacts(run_dir):
    return export(run_dir).artifacts


def test_every_form_reproduces_the_trained_engines_logits(artifacts):
    for directory in artifacts.values():
        assert artifact.read(directory).golden_difference <= 1e-5
    assert artifact.read(artifacts["hf"]).golden_difference == 0.0


def test_what_is_published_is_found_again_unless_the_recipe_asks_for_something_else(
    artifacts, run_dir, recipe, tmp_path
):
    source = checkpoint.chosen(run_dir)
    plan = Plan.from_dict(source.plan)
    assert published(source.directory, plan) == artifacts
    more = resolve(
        recipe("exported", train__steps=12, export=[{"type": "hf", "max_shard_size": "1MB"}, {"type": "onnx"}])
    )
    assert published(source.directory, more) is None
    (artifacts["onnx"] / "README.md").rename(tmp_path / "README.md")
    assert published(source.directory, plan) is None
    (tmp_path / "README.md").rename(artifacts["onnx"] / "README.md")


def test_one_export_type_twice_is_refused(recipe):
    with pytest.raises(RecipeError, match="hf is given twice"):
        resolve(recipe("twice", export=[{"type": "hf"}, {"type": "hf"}]))


def test_both_forms_complete_prompts_alike(artifacts):
    requests = [
        {"prompt": text, "max_tokens": 12, "temperature": 0.0} for text in ("import os", "def f1(x):\n    ", "")
    ]
    answers = [open_artifact(directory).predict(requests) for directory in artifacts.values()]
    assert [a["tokens"] for a in answers[0]] == [a["tokens"] for a in answers[1]]
    assert all(a["tokens"] for a in answers[0])


def test_a_plain_transformers_user_can_load_the_directory(artifacts, run_dir):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(artifacts["hf"]).eval()
    assert AutoTokenizer.from_pretrained(artifacts["hf"]).encode("import os")
    golden = Golden.load(artifacts["hf"] / GOLDEN)
    with torch.no_grad():
        features = {key: torch.from_numpy(value) for key, value in golden.features.items()}
        logits = model(**features).logits.numpy()
    np.testing.assert_allclose(golden.real(logits), golden.real(golden.logits), atol=1e-5)
    weights = dict(checkpoint.newest(run_dir).weights())
    assert {name for name, _ in model.named_parameters()} == set(weights)


def test_no_file_of_a_run_is_a_pickle(run_dir, artifacts):
    endings = {path.suffix for path in run_dir.rglob("*") if path.is_file()}
    assert endings <= {".safetensors", ".json", ".jsonl", ".onnx", ".md", ".yaml", ".lock", ""}


def test_weights_that_answer_otherwise_than_the_engine_did_are_not_exported(recipe):
    run, _ = trained(recipe("tampered-weights", train__steps=4, export=[{"type": "hf"}]))
    (directory,) = checkpoint.complete(run)
    (path,) = directory.glob("weights-*.safetensors")
    weights = load_file(path)
    name = next(key for key in weights if "mlp" in key or "proj" in key)
    weights[name] = weights[name] * 1.01
    save_file(weights, path)
    with pytest.raises(CheckpointError, match="damaged"):
        export(run)
    manifest = read_sealed(directory / "manifest.json")  # even with hashes made to fit, the golden outputs refuse it
    files = inventory(directory, exclude=frozenset({"manifest.json"}))
    write_sealed(directory / "manifest.json", manifest | {"files": files})
    with pytest.raises(ArtifactError, match="answer otherwise than the trained model did"):
        export(run)
    assert not (run / "artifacts" / "hf").exists()


def test_an_artifact_with_a_changed_file_is_refused_and_the_file_named(artifacts, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(artifacts["hf"], copy)
    config = read_json(copy / "generation_config.json")
    (copy / "generation_config.json").write_text(json.dumps({**config, "max_length": 7}))
    with pytest.raises(ArtifactError, match=r"generation_config\.json: "):
        open_artifact(copy)


def test_an_artifact_with_an_added_file_is_refused_and_the_file_named(artifacts, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(artifacts["hf"], copy)
    (copy / "modeling_evil.py").write_text("raise SystemExit")
    with pytest.raises(ArtifactError, match=r"modeling_evil\.py: not in the manifest"):
        open_artifact(copy)


def test_an_artifact_whose_answers_changed_is_refused(artifacts, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(artifacts["hf"], copy)
    weights = load_file(copy / "model.safetensors")
    weights = {key: value * np.float32(1.02) for key, value in weights.items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    manifest = read_json(copy / "artifact.json")
    from raytx.files import inventory

    manifest["files"] = inventory(copy, exclude=frozenset({"artifact.json"}))
    write_json(copy / "artifact.json", artifact.sealed(manifest))
    with pytest.raises(ArtifactError, match="max_difference"):
        open_artifact(copy)


def test_a_manifest_that_was_changed_is_refused(artifacts, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(artifacts["hf"], copy)
    write_json(copy / "artifact.json", read_json(copy / "artifact.json") | {"labels": ["other"]})
    with pytest.raises(ArtifactError, match="its own digest differs"):
        artifact.read(copy, verify=False)


def test_compression_is_measured_and_its_form_held_to_the_compressed_model(recipe):
    steps = [{"type": "l1-pruning", "amount": 0.3}, {"type": "dynamic-int8"}]
    run, _ = trained(recipe("smaller", train__steps=12, compression=steps, export=[{"type": "hf"}]))
    exported = export(run)
    rows = read_json(run / "compression.json")
    assert [row["type"] for row in rows] == ["l1-pruning", "dynamic-int8"]
    assert all(0 < row["relative_error"] < 0.5 for row in rows)
    assert all(row["before"] is not None and row["after"] is not None for row in rows)
    assert artifact.read(exported.artifacts["hf"]).golden_difference <= 1e-5
    assert open_artifact(exported.artifacts["hf"]).predict([{"prompt": "import", "max_tokens": 3}])


def test_compression_over_its_limit_is_refused_with_both_numbers(recipe):
    steps = [{"type": "l1-pruning", "amount": 0.9, "max_relative_error": 0.001}]
    run, _ = trained(recipe("too-small", train__steps=4, compression=steps, export=[{"type": "hf"}]))
    with pytest.raises(ArtifactError, match=r"l1-pruning.*max_relative_error is 0\.001"):
        export(run)
    assert not (run / "artifacts" / "hf").exists()


def test_int8_modules_are_refused_for_onnx_at_plan_time(recipe):
    with pytest.raises(RecipeError, match=r"onnx.*dynamic-int8"):
        resolve(recipe("impossible", compression=[{"type": "dynamic-int8"}], export=[{"type": "onnx"}]))


def test_lora_trains_adapters_only_and_is_merged_at_export(recipe):
    model = {
        "type": "hf",
        "task": "causal-lm",
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "vocab_size": 320,
            "max_position_embeddings": 64,
        },
        "tokenizer": {"train": "bpe", "vocab_size": 320},
        "adapter": {"type": "lora", "r": 4},
    }
    run, _ = trained(recipe("lora", model=model, train__steps=8, export=FORMS))
    saved = checkpoint.newest(run).weights()
    assert saved
    assert all("lora_" in name for name in saved)
    exported = export(run)
    config = read_json(exported.artifacts["hf"] / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not list(exported.artifacts["hf"].glob("adapter*"))
    assert artifact.read(exported.artifacts["hf"]).golden_difference <= 1e-4


def test_the_best_checkpoint_stays_and_is_the_one_exported(recipe):
    """The metric's direction is turned round, so that the best step is the first one measured, not the last."""
    values = {
        "train__steps": 16,
        "evaluate__every": 4,
        "evaluate__mode": "max",
        "save__every": 4,
        "save__keep": "best",
        "save__num_to_keep": 1,
    }
    run, log = trained(recipe("best", export=[{"type": "hf"}], **values))
    losses = {row["step"]: row["loss"] for row in log if row["kind"] == "eval"}
    best = max(losses, key=losses.get)
    assert best < 16, "the test needs a run whose last step is not its best"
    assert sorted(path.name for path in checkpoint.complete(run)) == [f"step-{best:08d}", "step-00000016"]
    exported = export(run)
    assert artifact.read(exported.artifacts["hf"]).lineage["step"] == best
    assert artifact.read(exported.artifacts["hf"]).metrics["loss"] == pytest.approx(losses[best])


def test_the_consolidated_weights_are_the_checkpoints(run_dir, artifacts):
    weights = load_file(artifacts["hf"] / "model.safetensors")
    saved = Checkpoint(checkpoint.complete(run_dir)[0]).weights()
    for name, value in saved.items():
        np.testing.assert_array_equal(weights[name], value)
