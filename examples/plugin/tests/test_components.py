"""Both components keep their protocols, and compression keeps what it promises."""

from __future__ import annotations

import pytest
from raytx_example_plugin.gated_conv import GatedConv
from raytx_example_plugin.svd import SVD

from raytx.components import Component
from raytx.testing import check_component, check_compression, check_export

TINY = GatedConv(hidden_size=32, num_hidden_layers=2, kernel_size=4, vocab_size=320)


@pytest.mark.parametrize("config", [TINY, TINY.model_copy(update={"packing": False}), SVD()], ids=str)
def test_a_component_keeps_its_protocol(config: Component) -> None:
    check_component(config)


def test_compression_works_on_our_own_model() -> None:
    check_compression(SVD(ratio=0.3), model=TINY)


def test_our_model_compressed_by_us_goes_through_the_shipped_export() -> None:
    from raytx.registry import registry

    export = registry().find("export", "hf")()
    check_export(export, model=TINY, compression=[SVD()])


@pytest.mark.parametrize(("inputs", "outputs"), [(40, 24), (24, 40)])
def test_the_factors_are_the_best_of_their_rank_and_within_the_ratio(inputs: int, outputs: int) -> None:
    import torch

    torch.manual_seed(0)
    linear = torch.nn.Linear(inputs, outputs)
    holder = torch.nn.Sequential(linear)
    pair = SVD(ratio=0.5).build().convert(holder)[0]
    rank = pair[0].out_features
    assert pair[0].weight.numel() + pair[1].weight.numel() <= 0.5 * linear.weight.numel()
    left_out = torch.linalg.svdvals(linear.weight)[rank:].square().sum().sqrt()
    error = (pair[1].weight @ pair[0].weight - linear.weight).norm()
    assert error.item() == pytest.approx(left_out.item(), rel=1e-4)
    assert torch.equal(pair[1].bias, linear.bias)
