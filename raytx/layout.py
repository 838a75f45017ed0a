"""Parallel sizes whose product is the world size, and where each rank stands among them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coordinate:
    """Where one rank stands: its index along each parallel dimension."""

    pipeline: int
    data: int
    sequence: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """The grid of ranks. Tensor is innermost, so that its chatty ranks share a node; pipeline is outermost."""

    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    sequence_parallel_size: int = 1

    @property
    def world_size(self) -> int:
        return self.data_parallel_size * self.ranks_per_replica

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that hold one copy of the model together, and so read the same samples."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.sequence_parallel_size

    def coordinate(self, rank: int) -> Coordinate:
        """Return the coordinate of a rank in [0, world size)."""
        assert 0 <= rank < self.world_size
        rest, tensor = divmod(rank, self.tensor_parallel_size)
        rest, sequence = divmod(rest, self.sequence_parallel_size)
        pipeline, data = divmod(rest, self.data_parallel_size)
        return Coordinate(pipeline=pipeline, data=data, sequence=sequence, tensor=tensor)

    def dp_rank(self, rank: int) -> int:
        """Return which share of the global batch a rank reads; ranks of one model replica share it."""
        return self.coordinate(rank).data

    def groups(self, *dimensions: str) -> list[list[int]]:
        """Return the ranks that differ in nothing but these dimensions, group by group, each in rank order."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = vars(self.coordinate(rank))
            found.setdefault(tuple(v for name, v in place.items() if name not in dimensions), []).append(rank)
        return list(found.values())
