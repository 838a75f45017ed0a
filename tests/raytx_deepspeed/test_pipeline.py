"""What one stage holds and reads, how its loss is weighed, and how pieces are timed; without other ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raytx.components import Microbatch
from raytx_deepspeed.pipeline import Entry, Filling, StagePart, _kept, _topology
from raytx_deepspeed.pipeline_module import TRAVELLING, Fed, Loss
from raytx_deepspeed.pipeline_timing import costs
from raytx_hf.pieces import pieces_of

STAGES = ((0, 2), (2, 4))
CPU = torch.device("cpu")


def llama(**config):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=20, **config))


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def whole(request):
    torch.manual_seed(0)
    return llama(tie_word_embeddings=request.param).eval()


@pytest.fixture
def structure(whole):
    with torch.device("meta"):
        return llama(tie_word_embeddings=whole.config.tie_word_embeddings).eval()


@pytest.fixture
def reading(whole):
    """Weights of the whole model, and the names that were asked for."""
    values = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    asked = []

    def read(name):
        asked.append(name)
        return values[name].detach().numpy()

    return read, asked


@pytest.fixture
def filling(reading):
    return Filling(reading[0], {}, CPU, torch.float32)


def features(*, labels=True):
    ids = np.array([[3, 4, 5, 6, 7, 8]])
    batch = {"input_ids": ids, "position_ids": np.array([[0, 1, 2, 0, 1, 2]])}
    return batch | ({"labels": np.where(ids == 3, -100, ids)} if labels else {})


# ---- what a stage holds


def test_stages_one_after_the_other_are_the_whole_model(whole, structure, filling):
    pieces = pieces_of(structure, TRAVELLING)
    for stage in (0, 1):
        StagePart.of(pieces, STAGES, stage, filling)
    fed = Fed.of(Microbatch(features(), weight=1.0, seed=0), CPU, weighed=False)
    travel = (fed.ids, *fed.travelling)
    for piece in pieces:
        travel = piece.module(travel)
    expected = whole(input_ids=fed.ids, position_ids=fed.travelling[TRAVELLING.index("position_ids")], use_cache=False)
    torch.testing.assert_close(travel, expected.logits, rtol=0, atol=0)


def test_a_stage_reads_its_own_tensors_only_and_leaves_the_others_on_the_meta_device(structure, filling, reading):
    pieces = pieces_of(structure, TRAVELLING)
    part = StagePart.of(pieces, STAGES, 0, filling)
    own = {name for piece in pieces[:2] for name in piece.names.values()}
    assert set(reading[1]) == own
    assert len(reading[1]) == len(own)
    assert part.trained.keys() == {name for name in own if name.endswith("weight")}
    layer = dict(pieces[2].module.layer.named_parameters())
    assert layer
    assert all(parameter.is_meta for parameter in layer.values())


def test_a_tied_parameter_is_held_by_both_ends_and_written_by_the_first(structure, whole):
    pieces = pieces_of(structure, TRAVELLING)
    entries = {name: Entry.of(name, kept, pieces, STAGES) for name, kept in _kept(structure).items()}
    tied = whole.config.tie_word_embeddings
    assert entries["model.embed_tokens.weight"].stages == ((0, 1) if tied else (0,))
    assert ("lm_head.weight" in entries) != tied
    assert entries["model.layers.1.mlp.up_proj.weight"].stages == (1,)
    assert list(entries) == [name for name, _ in structure.named_parameters()]


def test_ranks_stand_in_deepspeeds_grid_where_they_stand_in_raytxs():
    from raytx.layout import Layout

    layout = Layout(data_parallel_size=3, tensor_parallel_size=2, pipeline_parallel_size=4)
    assert _topology(layout).get_coord(13).pipe == layout.coordinate(13).pipeline == 2


# ---- loss


def test_a_microbatch_counts_by_its_weight_and_is_scaled_by_what_divides_it(whole):
    fed = Fed.of(Microbatch(features(), weight=0.25, seed=0), CPU, weighed=True)
    logits = torch.randn(1, 6, 20, generator=torch.Generator().manual_seed(0))
    expected = whole.loss_function(logits=logits, labels=fed.target[0], vocab_size=20)
    loss = Loss(divisor=8)
    assert float(loss(logits, fed.target)) == pytest.approx(float(expected) * 0.25 * 8, rel=1e-6)
    loss(logits, fed.target)
    assert float(loss.taken()) == pytest.approx(float(expected) * 0.5, rel=1e-6)
    assert loss.taken() == 0.0


def test_an_evaluated_microbatch_gives_its_mean_and_is_not_added_up():
    fed = Fed.of(Microbatch(features(), weight=0.25, seed=0), CPU, weighed=False)
    loss = Loss(divisor=8)
    assert float(loss(torch.zeros(1, 6, 20), fed.target)) == pytest.approx(math.log(20), rel=1e-6)
    assert loss.taken() == 0.0


def test_without_labels_there_is_no_loss():
    fed = Fed.of(Microbatch(features(labels=False), weight=1.0, seed=0), CPU, weighed=True)
    assert math.isnan(Loss(divisor=1)(torch.zeros(1, 6, 20), fed.target))


def test_a_microbatch_without_targets_adds_nothing():
    batch = features() | {"labels": np.full((1, 6), -100)}
    fed = Fed.of(Microbatch(batch, weight=0.0, seed=0), CPU, weighed=True)
    assert float(Loss(divisor=4)(torch.randn(1, 6, 20), fed.target)) == 0.0


# ---- time


def test_one_piece_of_each_shape_is_timed_and_everything_is_meta_again(structure, filling, reading):
    pieces = pieces_of(structure, TRAVELLING)
    before = {id(tensor) for tensor in structure.parameters()}
    seconds = costs(pieces, filling.fill, (2, 8), CPU)
    assert len(seconds) == 4
    assert all(value > 0 for value in seconds)
    assert seconds[1] == seconds[2]
    assert not any(".layers.1." in name for name in reading[1])
    assert {id(tensor) for tensor in structure.parameters()} == before
    assert all(tensor.is_meta for piece in pieces for tensor in piece.module.parameters())
