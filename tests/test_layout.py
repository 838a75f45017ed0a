"""The layout: every rank has one place in the grid, and ranks of a replica share their data."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from raytx.layout import Layout

GRIDS = [Layout(*sizes) for sizes in itertools.product((1, 2, 3), (1, 2), (1, 4))]


@pytest.mark.parametrize("layout", GRIDS, ids=str)
def test_every_rank_has_a_coordinate_of_its_own(layout: Layout) -> None:
    places = {layout.coordinate(rank) for rank in range(layout.world_size)}
    assert len(places) == layout.world_size


@pytest.mark.parametrize("layout", GRIDS, ids=str)
def test_each_share_of_the_data_is_read_by_one_replica(layout: Layout) -> None:
    shares = Counter(layout.dp_rank(rank) for rank in range(layout.world_size))
    assert set(shares) == set(range(layout.data_parallel_size))
    assert set(shares.values()) == {layout.tensor_parallel_size * layout.pipeline_parallel_size}


def test_tensor_parallel_ranks_are_neighbours_and_pipeline_stages_are_far_apart() -> None:
    layout = Layout(data_parallel_size=2, tensor_parallel_size=2, pipeline_parallel_size=2)
    assert [layout.coordinate(rank).tensor for rank in range(4)] == [0, 1, 0, 1]
    assert [layout.coordinate(rank).pipeline for rank in (0, 3, 4, 7)] == [0, 0, 1, 1]
