"""The process groups of one rank, in the form that DeepSpeed asks for them (it calls such an object an mpu)."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from raytx.layout import Layout


class Groups:
    """One rank's groups along the dimensions of a layout without pipeline. Making it is a collective call.

    It is passed to DeepSpeed even where every group but the data-parallel one has a single rank: DeepSpeed keeps the
    last one it was given in a global, and takes a group of None for all ranks.
    """

    def __init__(self, layout: Layout, rank: int) -> None:
        self.layout, self.coordinate = layout, layout.coordinate(rank)
        self.data = group_of(layout, rank, "data")
        self.tensor = group_of(layout, rank, "tensor")
        self.sequence = group_of(layout, rank, "sequence")
        self.replicas = group_of(layout, rank, "data", "sequence")
        """The ranks over which parameters are the same, gradients are added and ZeRO shards."""

    def get_data_parallel_group(self) -> Any:
        return self.data

    def get_data_parallel_rank(self) -> int:
        return self.coordinate.data

    def get_data_parallel_world_size(self) -> int:
        return self.layout.data_parallel_size

    def get_model_parallel_group(self) -> Any:
        return self.tensor

    def get_model_parallel_rank(self) -> int:
        return self.coordinate.tensor

    def get_model_parallel_world_size(self) -> int:
        return self.layout.tensor_parallel_size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_sequence_parallel_group(self) -> Any:
        return self.sequence

    def get_sequence_parallel_rank(self) -> int:
        return self.coordinate.sequence

    def get_sequence_parallel_world_size(self) -> int:
        return self.layout.sequence_parallel_size

    def get_sequence_data_parallel_group(self) -> Any:
        return self.replicas

    def get_sequence_data_parallel_rank(self) -> int:
        return self.coordinate.data * self.layout.sequence_parallel_size + self.coordinate.sequence

    def get_sequence_data_parallel_world_size(self) -> int:
        return self.layout.data_parallel_size * self.layout.sequence_parallel_size


def group_of(layout: Layout, rank: int, *dimensions: str) -> Any:
    """Make all groups of ranks that differ in these dimensions only; return this rank's. A collective call of all.

    torch can let the members of a group meet by themselves, under a name made of their ranks; where the same ranks make
    one group after the other they then wait for ever.
    """
    made = {tuple(ranks): dist.new_group(ranks) for ranks in layout.groups(*dimensions)}
    (mine,) = [group for ranks, group in made.items() if rank in ranks]
    return mine
