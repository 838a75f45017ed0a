"""What a checkpoint holds is what plain transformers and peft load, and a tensor's memory is enough to get there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from raytx import checkpoint, saving
from raytx.artifact import Golden
from raytx.checkpoint import Checkpoint, State
from raytx.consolidate import Stored, consolidate
from raytx.errors import CheckpointError, RecipeError
from raytx.export import export
from raytx.plan import Plan, resolve
from raytx.prepare import prepare
from raytx.saving import Saver

BPE = {"train": "bpe", "vocab_size": 320}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
LLAMA = {"model_type": "llama", "intermediate_size": 64, "max_position_embeddings": 64, **SIZES}
CAUSAL = {
    "llama": LLAMA,
    "llama, tied": {**LLAMA, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 320},
    "mixtral": {**LLAMA, "model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4},
}
BERT = {"model_type": "bert", "intermediate_size": 64, "max_position_embeddings": 64, **SIZES}
ADAPTER = {"type": "lora", "r": 4, "alpha": 12}
MB = 10**6


class Still:
    """An engine that trains no more: it hands out the tensors it was given."""

    def __init__(self, tensors):
        self._tensors = tensors

    def gather(self, value):
        return [value]

    def tensors(self):
        return ((name, "weight", array) for name, array in self._tensors)


@pytest.fixture(scope="module")
def committed(recipe):
    """Commit a checkpoint of a recipe whose trained weights are other than its starting ones."""

    def make(name, *, without=None, **values):
        plan, _ = prepare(resolve(recipe(name.replace(", ", "-"), **values)), Console(quiet=True))
        model, processor = plan.recipe.model.build(), Path(plan.prepared) / "processor"
        structure = model.structure(processor)
        weights = model.weights(processor, seed=plan.recipe.train.seed)
        engine = Still((name, array) for name, array in trained(structure, weights) if name != without)
        golden = Golden({"attention_mask": np.ones((1, 2), np.int64)}, np.zeros((1, 2), np.float32))
        state = State(step=7, metrics={"loss": 1.5})
        saver = Saver(engine, plan, rank=0, promised={}, log=lambda record: None, flush=lambda: None)
        saver.begin(state, golden=golden, demo=[])
        saver.wait()
        return checkpoint.directory_of(plan.run_dir, state.step)

    return make


def trained(structure, weights):
    random = np.random.default_rng(5)
    for name, parameter in structure.named_parameters():
        if parameter.requires_grad:
            yield name, weights(name) + random.normal(0, 0.1, tuple(parameter.shape)).astype(np.float32)


def whole(directory):
    """Return the module that exporting makes of a checkpoint, with all its weights in memory."""
    source = Checkpoint(directory)
    recipe = Plan.from_dict(source.plan).recipe
    model = recipe.model.build()
    module = model.module(source.processor, seed=recipe.train.seed)
    model.assign(module, source.weights())
    return model.merged(module)


def opened(directory, auto=AutoModelForCausalLM, **options):
    """Load a directory by plain transformers; every weight must come from its files."""
    module, loading = auto.from_pretrained(directory, output_loading_info=True, **options)
    assert {key: list(found) for key, found in loading.items() if found} == {}
    return module


def assert_same(module, other):
    left, right = module.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("family", CAUSAL)
def test_plain_transformers_loads_the_checkpoints_weights_bit_for_bit(committed, tmp_path, family):
    source = committed(
        f"plain-{family}", model={"type": "hf", "task": "causal-lm", "config": CAUSAL[family], "tokenizer": BPE}
    )
    module = opened(consolidate(source, tmp_path / "out").directory)
    assert_same(module, whole(source))
    for name, value in Checkpoint(source).weights().items():
        np.testing.assert_array_equal(module.state_dict()[name].numpy(), value, err_msg=name)


@pytest.mark.parametrize("family", CAUSAL)
def test_files_are_those_that_save_pretrained_writes_of_the_whole_model(committed, tmp_path, family):
    source = committed(
        f"saved-{family}", model={"type": "hf", "task": "causal-lm", "config": CAUSAL[family], "tokenizer": BPE}
    )
    consolidate(source, tmp_path / "out")
    whole(source).save_pretrained(tmp_path / "saved")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "saved"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "saved"))
    assert ours == theirs


def test_our_own_decoder_keeps_its_tie(committed, tmp_path):
    source = committed("own")
    directory = consolidate(source, tmp_path / "out").directory
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    module = opened(directory)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert_same(module, whole(source))


def test_a_classifier_keeps_its_labels_and_its_tokenizer(committed, tmp_path):
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"word{n % 7} thing,{'ab'[n % 2]}\n" for n in range(40))
    )
    source = committed(
        "classifier",
        model={
            "type": "hf",
            "task": "sequence-classification",
            "config": BERT,
            "tokenizer": {"train": "wordpiece", "vocab_size": 320},
        },
        data={"type": "files", "path": str(tmp_path / "rows.csv"), "split": {"test": 0.2}},
    )
    directory = consolidate(source, tmp_path / "out").directory
    module = opened(directory, AutoModelForSequenceClassification)
    assert_same(module, whole(source))
    assert module.config.id2label == {0: "a", 1: "b"}
    assert AutoTokenizer.from_pretrained(directory)("word1 thing")["input_ids"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrower_numbers_are_rounded_as_torch_rounds_them(committed, tmp_path, dtype):
    source = committed("narrow")
    module = opened(consolidate(source, tmp_path / "out", dtype=dtype).directory, dtype="auto")
    assert module.dtype == getattr(torch, dtype)
    assert_same(module, whole(source).to(getattr(torch, dtype)))


def test_a_small_limit_gives_many_files_and_an_index(committed, tmp_path):
    source = committed("shards")
    written = consolidate(source, tmp_path / "out", max_shard_size="30KB")
    assert len(written.files) > 2
    assert all((tmp_path / "out" / name).stat().st_size < 33_000 for name in written.files[1:])
    assert_same(opened(tmp_path / "out"), whole(source))


@pytest.fixture(scope="module")
def base(committed, tmp_path_factory):
    """A directory of a pretrained model."""
    directory = tmp_path_factory.mktemp("base") / "model"
    model = {"type": "hf", "task": "causal-lm", "config": CAUSAL["gpt2"], "tokenizer": BPE}
    return consolidate(committed("base", model=model), directory).directory


@pytest.fixture(scope="module")
def adapted(committed, base):
    return committed("adapted", model={"type": "hf", "task": "causal-lm", "path": str(base), "adapter": ADAPTER})


def test_adapters_are_merged_as_peft_merges_the_whole_model(adapted, tmp_path):
    assert_same(opened(consolidate(adapted, tmp_path / "out").directory), whole(adapted))


def test_an_adapter_alone_opens_by_plain_peft_and_gives_the_same_logits(adapted, base, tmp_path):
    written = consolidate(adapted, tmp_path / "out", adapter_only=True)
    assert written.files == ["adapter_model.safetensors"]
    assert written.bytes == sum(value.nbytes for value in Checkpoint(adapted).weights().values())
    module = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), written.directory)
    assert module.peft_config["default"].base_model_name_or_path == str(base)
    saved = Checkpoint(adapted).weights()
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            np.testing.assert_array_equal(parameter.detach().numpy(), saved[name], err_msg=name)
    assert_same(module.merge_and_unload(safe_merge=True), whole(adapted))


def test_a_classifier_trained_beside_an_adapter_is_written_too(committed, tmp_path):
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"word{n % 7} thing,{'ab'[n % 2]}\n" for n in range(40))
    )
    source = committed(
        "adapted-classifier",
        model={
            "type": "hf",
            "task": "sequence-classification",
            "config": BERT,
            "tokenizer": {"train": "wordpiece", "vocab_size": 320},
            "adapter": ADAPTER,
        },
        data={"type": "files", "path": str(tmp_path / "rows.csv"), "split": {"test": 0.2}},
    )
    module = opened(consolidate(source, tmp_path / "out").directory, AutoModelForSequenceClassification)
    assert_same(module, whole(source))
    saved = load_file(
        consolidate(source, tmp_path / "alone", adapter_only=True).directory / "adapter_model.safetensors"
    )
    head = Checkpoint(source).weights()["base_model.model.classifier.modules_to_save.default.weight"]
    np.testing.assert_array_equal(saved["base_model.model.classifier.weight"], head)


def test_a_trained_runs_weights_are_those_of_its_export(train_here, recipe, tmp_path):
    wanted = recipe("trained", train__steps=4, export=[{"type": "hf"}])
    train_here(wanted)
    run_dir = resolve(wanted).run_dir
    written = consolidate(run_dir, tmp_path / "out")
    ours = load_file(written.directory / "model.safetensors")
    theirs = load_file(export(run_dir).artifacts["hf"] / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


STRATEGIES = {
    "fsdp": {"type": "fsdp"},
    "zero-3": {"type": "deepspeed", "stage": 3},
    "tensor": {"type": "deepspeed-3d", "pipeline_parallel_size": 1, "tensor_parallel_size": 2},
    "pipeline": {"type": "deepspeed-3d", "pipeline_parallel_size": 2, "tensor_parallel_size": 1},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_several_ranks_have_trained_is_one_model(run_ranks, recipe, tmp_path, strategy):
    wanted = recipe(f"ranks-{strategy}", strategy=STRATEGIES[strategy], scaling__num_workers=2, train__steps=4)
    run_ranks([wanted])
    source = checkpoint.chosen(resolve(wanted).run_dir)
    module = opened(consolidate(source.directory, tmp_path / "out").directory)
    assert_same(module, whole(source.directory))
    assert source.golden.difference(wanted.model.build().runner(module)) < 1e-5


def test_an_adapter_of_a_model_that_has_none_is_refused(committed, tmp_path):
    with pytest.raises(RecipeError, match="trained without an adapter"):
        consolidate(committed("none"), tmp_path / "out", adapter_only=True)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_lacks_a_trained_weight_is_refused_and_nothing_is_left(committed, tmp_path):
    source = committed("lacking", without="model.norm.weight")
    with pytest.raises(CheckpointError, match=r"lacks 1 trained parameters, 'model\.norm\.weight'"):
        consolidate(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_in_many_files_is_one_model(committed, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "SHARD_BYTES", 20_000)
    source = committed("pieces")
    assert len(list(source.glob("weights-*"))) > 2
    assert_same(opened(consolidate(source, tmp_path / "out").directory), whole(source))


def test_a_run_that_retires_its_checkpoint_meanwhile_takes_nothing_away(committed, tmp_path):
    source = committed("retired")
    before = dict(Checkpoint(source).weights())
    with Stored(Checkpoint(source)) as stored:
        for path in source.glob("weights-*"):
            path.unlink()
        assert stored.keys() == before.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(stored[name], value, err_msg=name)


def test_a_damaged_checkpoint_is_refused(committed, tmp_path):
    source = committed("damaged")
    (weights,) = source.glob("weights-*")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        consolidate(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


LARGE = {
    "model__hidden_size": 512,
    "model__intermediate_size": 2048,
    "model__num_hidden_layers": 19,
    "model__num_attention_heads": 8,
    "model__num_key_value_heads": 4,
}
"""75 million parameters, of which the largest tensor is 4 MB in fp32."""
MEASURE = """
import sys
from pathlib import Path
from raytx.checkpoint import Checkpoint
from raytx.consolidate import Stored, consolidate

def peak():  # getrusage would tell the peak of the process that started this one, where that is higher
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

small, large, directory = sys.argv[1:]
consolidate(small, directory + "/small")
before = peak()
written = consolidate(large, directory + "/large", max_shard_size="50MB")
streamed = peak() - before
with Stored(Checkpoint(Path(large))) as stored:
    held = dict(stored)
print(written.bytes, len(written.files), streamed, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_stays_below_one_shard_of_a_checkpoint_six_times_as_large(committed, tmp_path):
    streamed, loaded = measured(committed("small"), committed("large", **LARGE), tmp_path)
    assert loaded > 290 * MB, "the measure does not tell"
    assert streamed < 50 * MB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_merging_an_adapter_into_a_large_base_takes_no_more(committed, tmp_path):
    """The base is in other files than the checkpoint, which are read tensor by tensor as well."""

    def adapted(name, **config):
        plain = {"type": "hf", "task": "causal-lm", "config": LLAMA | config, "tokenizer": BPE}
        base = consolidate(committed(f"{name}-base", model=plain), tmp_path / name).directory
        model = {"type": "hf", "task": "causal-lm", "path": str(base), "adapter": ADAPTER}
        return committed(f"{name}-adapted", model=model)

    large = {key.removeprefix("model__"): value for key, value in LARGE.items()}
    streamed, _ = measured(adapted("slight"), adapted("huge", **large), tmp_path)
    assert streamed < 50 * MB


def measured(small, large, directory):
    """Return by how many bytes peak memory grew when 300 MB were consolidated, and when they were loaded after that.

    Libraries are loaded and a small checkpoint is written before memory is first measured, so what is left is a tensor
    of 4 MB in a few forms, structures and names.
    """
    command = [sys.executable, "-c", MEASURE, small, large, directory]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    written, files, streamed, loaded = map(int, done.stdout.splitlines()[-1].split())  # libraries may say things before
    assert written > 290 * MB
    assert files >= 6
    return streamed, loaded
