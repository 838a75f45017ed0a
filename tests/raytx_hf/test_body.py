"""The model behind the hf component."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raytx.errors import CheckpointError, RecipeError
from raytx.registry import registry


def _tensors(features: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in features.items()}


def _packed(documents: list[list[list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """Rows of documents, padded with one-token documents, as CausalLM.collate has them."""
    ids = [[token for document in row for token in document] for row in documents]
    positions = [[place for document in row for place in range(len(document))] for row in documents]
    width = max(map(len, ids))
    return {
        "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in ids]),
        "position_ids": torch.tensor([row + [0] * (width - len(row)) for row in positions]),
    }


def test_a_packed_document_gets_the_logits_it_gets_alone(causal: Any) -> None:
    _, task, module = causal
    rows = [[[5, 6, 7], [8, 9, 10, 11]], [[12, 13], [14, 15], [16, 17]]]
    with torch.no_grad():
        packed = module(**_packed(rows, task.pad)).logits
        for row, documents in enumerate(rows):
            start = 0
            for document in documents:
                alone = module(input_ids=torch.tensor([document])).logits[0]
                assert (packed[row, start : start + len(document)] - alone).abs().max() <= 1e-5
                start += len(document)


def test_a_packed_document_does_depend_on_its_own_earlier_tokens(causal: Any) -> None:
    _, task, module = causal
    with torch.no_grad():
        one = module(**_packed([[[5, 6, 7], [8, 9, 10]]], task.pad)).logits[0, -1]
        other = module(**_packed([[[5, 6, 7], [4, 9, 10]]], task.pad)).logits[0, -1]
    assert (one - other).abs().max() > 1e-3


def test_the_loss_is_the_mean_over_targets_of_the_next_token(tiny: Any, causal: Any) -> None:
    _, task, module = causal
    samples = list(task.features(tiny.text_rows(), lambda *_: None))[:3]
    batch = task.collate(samples)
    with torch.no_grad():
        output = module.train(False)(**_tensors(batch))
    shares = torch.log_softmax(output.logits[:, :-1], -1).numpy()
    losses = [
        -shares[row, place, label]
        for row, labels in enumerate(batch["labels"])
        for place, label in enumerate(labels[1:])
        if label != -100
    ]
    assert len(losses) == sum(sample["num_targets"] for sample in samples)
    assert float(output.loss) == pytest.approx(float(np.mean(losses)), rel=1e-5)


def test_packed_training_keeps_documents_apart_with_activation_checkpointing(tiny: Any, tmp_path: Path) -> None:
    for name, component in tiny.causal.items():
        model = tiny.prepared(component, tmp_path / name)
        torch.manual_seed(1)
        plain = model.module(tmp_path / name)
        torch.manual_seed(1)
        saving = model.module(tmp_path / name, activation_checkpointing=True)
        task = model.task(tmp_path / name)
        batch = _tensors(task.collate(list(task.features(tiny.text_rows(), lambda *_: None))[:2]))
        gradients = []
        for module in (plain, saving):
            module.train()
            torch.manual_seed(2)
            module(**batch).loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
        assert (gradients[0] - gradients[1]).abs().max() <= 1e-6, name


def test_a_seed_decides_the_starting_weights(tiny: Any, tmp_path: Path) -> None:
    model = tiny.prepared(tiny.causal["llama"], tmp_path)
    states = []
    for seed in (3, 3, 4):
        states.append(torch.cat([p.detach().flatten() for p in model.module(tmp_path, seed=seed).parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_size_counts_what_the_module_holds(tiny: Any, tmp_path: Path) -> None:
    for name, component in tiny.causal.items():
        module = tiny.prepared(component, tmp_path / name).module(tmp_path / name)
        size = registry().parse("model", component).size()
        assert size.parameters == size.trainable == sum(p.numel() for p in module.parameters()), name
        assert (size.layers, size.hidden_size, size.vocab_size) == (2, 32, 320)


def test_a_classifier_learns_its_labels_from_the_rows(tiny: Any, tmp_path: Path) -> None:
    component = tiny.classifier
    model = tiny.prepared(component, tmp_path, rows=tiny.labelled_rows)
    task, module = model.task(tmp_path), model.module(tmp_path)
    assert module.config.id2label == {0: "code", 1: "prose"}
    assert module.config.pad_token_id == task.tokenizer.pad_token_id
    batch = task.collate(list(task.features(tiny.labelled_rows(), lambda *_: None)))
    output = module(**_tensors(batch))
    assert output.logits.shape == (20, 2)
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize("base", ["llama", "bert"])
@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece"])
def test_padding_changes_no_classification(tiny: Any, base: str, algorithm: str, tmp_path: Path) -> None:
    config = getattr(tiny, base) | {"vocab_size": 320}
    tokenizer = {"train": algorithm}
    component = {"type": "hf", "task": "sequence-classification", "config": config, "tokenizer": tokenizer}
    model = tiny.prepared(component, tmp_path, rows=tiny.labelled_rows)
    task, module = model.task(tmp_path), model.module(tmp_path)
    run = model.runner(module)
    requests = [{"text": "dog"}, {"text": "the quick brown fox jumps over the dog"}]
    together = task.predict(run, requests)
    alone = [task.predict(run, [request])[0] for request in requests]
    for one, other in zip(together, alone, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)


def test_a_vocabulary_larger_than_the_embedding_is_refused(tiny: Any, tmp_path: Path) -> None:
    small = {
        **tiny.causal["llama"],
        "config": tiny.llama | {"vocab_size": 300},
        "tokenizer": {"train": "bpe", "vocab_size": 320},
    }
    with pytest.raises(RecipeError, match=r"model\.config\.vocab_size=300 is smaller .* 320"):
        tiny.prepared(small, tmp_path)


def test_samples_longer_than_the_positions_are_refused(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.max_length=65 is more than the model's 64 positions"):
        tiny.prepared(tiny.causal["llama"], tmp_path, max_length=65)


def test_a_misspelled_config_key_is_refused_with_the_nearest(tiny: Any) -> None:
    component = {**tiny.causal["llama"], "config": tiny.llama | {"hiden_size": 8}}
    with pytest.raises(RecipeError, match=r"model\.config\.hiden_size: .* Did you mean 'hidden_size'"):
        registry().parse("model", component).size()


def test_an_unknown_architecture_is_refused_with_the_nearest(tiny: Any) -> None:
    component = {**tiny.causal["llama"], "config": {"model_type": "lama"}}
    with pytest.raises(RecipeError, match=r"no 'lama'. Did you mean 'llama'"):
        registry().parse("model", component).size()


def test_an_architecture_without_the_task_is_refused(tiny: Any) -> None:
    component = {**tiny.causal["llama"], "config": {"model_type": "vit"}}
    with pytest.raises(RecipeError, match=r"no 'vit' model for task 'causal-lm'"):
        registry().parse("model", component).size()


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    component = {"type": "hf", "task": "causal-lm", "path": str(tmp_path)}
    with pytest.raises(RecipeError, match="no model could be read there"):
        registry().parse("model", component).size()


def test_pickled_weights_are_refused(tiny: Any, tmp_path: Path) -> None:
    made = tiny.prepared(tiny.causal["llama"], tmp_path / "made")
    module = made.module(tmp_path / "made")
    module.config.save_pretrained(tmp_path)
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    made.task(tmp_path / "made").tokenizer.save_pretrained(tmp_path)
    model = tiny.prepared({"type": "hf", "task": "causal-lm", "path": str(tmp_path)}, tmp_path / "again")
    with pytest.raises(RecipeError, match=r"model\.path="):
        model.module(tmp_path / "again")


def test_a_saved_model_is_a_starting_point_by_its_path(tiny: Any, tmp_path: Path) -> None:
    made = tiny.prepared(tiny.causal["llama"], tmp_path / "made")
    module = made.module(tmp_path / "made")
    module.save_pretrained(tmp_path / "saved")
    made.task(tmp_path / "made").tokenizer.save_pretrained(tmp_path / "saved")
    component = {"type": "hf", "task": "causal-lm", "path": str(tmp_path / "saved")}
    again = tiny.prepared(component, tmp_path / "again").module(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    assert again.config.use_cache is False


def test_assign_copies_every_trained_weight_and_misses_none(tiny: Any, tmp_path: Path) -> None:
    model = tiny.prepared(tiny.causal["gpt2"], tmp_path)
    one, other = model.module(tmp_path), model.module(tmp_path)
    weights = {name: p.detach().numpy().copy() for name, p in one.named_parameters()}
    model.assign(other, weights)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    weights.popitem()
    with pytest.raises(CheckpointError, match="lacks 1 trained parameter"):
        model.assign(other, weights)


def test_assign_takes_buffers_along_in_their_own_dtype(tiny: Any, tmp_path: Path) -> None:
    model = tiny.prepared(tiny.causal["gpt2"], tmp_path)
    one, other = model.module(tmp_path), model.module(tmp_path, seed=1)
    for module, count in ((one, 7), (other, 0)):
        module.lm_head.register_buffer("seen", torch.tensor(count))
        module.lm_head.register_buffer("scale", torch.full((3,), float(count)))
        module.transformer.wte.weight.requires_grad_(False)
    weights = {name: value.detach().float().numpy().copy() for name, value in one.state_dict().items()}
    model.assign(other, weights)
    assert (other.lm_head.seen.dtype, int(other.lm_head.seen)) == (torch.int64, 7)
    assert torch.equal(other.lm_head.scale, one.lm_head.scale)
    assert torch.equal(other.transformer.wte.weight, one.transformer.wte.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.h.9.ln_1.weight": np.ones(32, np.float32)}, r"has no 'transformer\.h\.9\.ln_1\.weight'"),
        ({"transformer.ln_f.weight": np.ones(1, np.float32)}, r"is \(1,\) in the checkpoint, \(32,\) in the model"),
    ],
)
def test_assign_refuses_what_the_model_cannot_hold(tiny: Any, change: Any, message: str, tmp_path: Path) -> None:
    model = tiny.prepared(tiny.causal["gpt2"], tmp_path)
    module = model.module(tmp_path)
    weights = {name: p.detach().numpy().copy() for name, p in module.named_parameters()}
    with pytest.raises(CheckpointError, match=message):
        model.assign(module, weights | change)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": [1]},
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": None},
        {"vocab_size": -5},
        {"vocab_size": "many"},
        {"hidden_act": "nothing"},
        {"hidden_act": [1]},
        {"rope_parameters": 3},
        {"intermediate_size": {}},
    ],
)
def test_a_config_value_that_cannot_be_is_a_recipe_error(tiny: Any, wrong: dict[str, Any]) -> None:
    component = {**tiny.causal["llama"], "config": tiny.llama | wrong}
    with pytest.raises(RecipeError, match="model"):
        registry().parse("model", component).size()


def _fingerprint(component: dict[str, Any]) -> str:
    return registry().parse("model", component).build().fingerprint()


def test_the_fingerprint_follows_a_local_tokenizer_but_not_weights(tiny: Any, tmp_path: Path) -> None:
    made = tiny.prepared(tiny.causal["llama"], tmp_path / "made")
    made.module(tmp_path / "made").save_pretrained(tmp_path / "made")
    component = {"type": "hf", "task": "causal-lm", "path": str(tmp_path / "made")}
    first = _fingerprint(component)
    with open(tmp_path / "made/model.safetensors", "ab") as file:
        file.write(b"0")
    assert _fingerprint(component) == first
    with open(tmp_path / "made/tokenizer.json", "a") as file:
        file.write("\n")
    assert _fingerprint(component) != first


@pytest.mark.parametrize("family", ["llama", "decoder"])
def test_one_relative_path_in_two_directories_has_two_fingerprints(
    family: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prints = set()
    for name in ("one", "other"):
        (tmp_path / name / "words").mkdir(parents=True)
        (tmp_path / name / "words/tokenizer.json").write_text(name)
        monkeypatch.chdir(tmp_path / name)
        component = {**tiny.causal[family], "tokenizer": "words"}
        assert list(registry().parse("model", component).local_files()) == [("tokenizer", "words")]
        prints.add(_fingerprint(component))
    assert len(prints) == 2


def test_names_on_the_hub_and_trained_tokenizers_have_no_files_to_follow(tiny: Any) -> None:
    hub = {"type": "hf", "task": "causal-lm", "path": "owner/name"}
    assert _fingerprint(hub) == _fingerprint({**hub, "path": "owner/other"})
    assert _fingerprint(tiny.causal["llama"]) == _fingerprint(tiny.causal["decoder"])
