"""Plan which rank writes and reads which pieces of flattened global tensors.

A save asserts that the pieces of all ranks cover each global tensor exactly once. A load reads, for each piece that a rank
needs, the overlapping parts of the stored pieces. Neither side knows the other's layout.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from megamoe.checkpoint.manifest import StoredTensor
from megamoe.core.errors import CheckpointError

_Held = tuple[str, int, int, int, torch.dtype]  # name, first element, elements, elements of the global tensor, dtype


@dataclass(frozen=True)
class Slot:
    """A piece in a plan: a range of the flattened global tensor ``name`` (``size`` elements), and its memory here."""

    name: str
    size: int
    start: int
    data: Tensor

    @property
    def key(self) -> str:
        """Name of the piece within a file."""
        return piece_key(self.name, self.start)


@dataclass(frozen=True)
class WritePlan:
    """Which rank writes what; the same for every save of a run.

    Attributes:
        mine: Keys of the pieces that this rank writes.
        tensors: On rank 0, what all ranks write; elsewhere empty.
    """

    mine: frozenset[str]
    tensors: dict[str, StoredTensor]


def plan_writes(slots: Sequence[Slot]) -> WritePlan:
    """Divide the pieces among the ranks. All ranks call, each with the pieces that it holds.

    The first rank that holds a replica of a range writes it. Every global tensor is covered exactly once.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    held = [(slot.name, slot.start, slot.data.numel(), slot.size, slot.data.dtype) for slot in slots]
    everyone: list[Any] | None = [None] * ranks if rank == 0 else None
    dist.gather_object(held, everyone, dst=0)
    shares: list[Any] | None = None
    tensors: dict[str, StoredTensor] = {}
    if everyone is not None:
        shares, tensors = _share_out(everyone)
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, shares, src=0)
    return WritePlan(mine[0], tensors)


def _share_out(everyone: list[list[_Held]]) -> tuple[list[frozenset[str]], dict[str, StoredTensor]]:
    seen: set[str] = set()
    pieces: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    kinds: dict[str, tuple[int, torch.dtype]] = {}
    shares = []
    for rank, held in enumerate(everyone):
        share = set()
        for name, start, count, size, dtype in held:
            key = piece_key(name, start)
            if key not in seen:
                share.add(key)
                pieces[name].append((start, count, rank_file(rank)))
                assert kinds.setdefault(name, (size, dtype)) == (size, dtype), f"{name}: ranks differ in size or type"
        seen |= share
        shares.append(frozenset(share))
    tensors = {}
    for name, (size, dtype) in kinds.items():
        ordered = tuple(sorted(pieces[name]))
        end = 0
        for start, count, _ in ordered:
            assert start == end, f"{name}: element {end} is covered by no rank or by two"
            end += count
        assert end == size, f"{name}: {size - end} elements are covered by no rank"
        tensors[name] = StoredTensor(size, str(dtype).removeprefix("torch."), ordered)
    return shares, tensors


@dataclass
class PieceLoadPlanner(LoadPlanner):
    """Fills each slot from whatever pieces are stored; ``optional`` slots stay unchanged if nothing is stored for them."""

    slots: list[Slot]
    optional: list[Slot] = field(default_factory=list)
    metadata: Metadata | None = field(default=None, init=False)

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Store the metadata for planning."""
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """Plan the reads that fill this rank's slots.

        Raises:
            CheckpointError: a tensor is missing, has another size, or is not stored completely.
        """
        assert self.metadata is not None
        self.slots += [slot for slot in self.optional if slot.name in self.metadata.state_dict_metadata]
        items = []
        for number, slot in enumerate(self.slots):
            stored = self.metadata.state_dict_metadata.get(slot.name)
            if not isinstance(stored, TensorStorageMetadata):
                raise CheckpointError(f"checkpoint has no tensor {slot.name}: it is of another model")
            if stored.size[0] != slot.size:
                raise CheckpointError(f"checkpoint tensor {slot.name} has {stored.size[0]} elements, not {slot.size}")
            items += _reads(number, slot, stored.chunks)
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Change nothing: ranks read independently."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Change nothing."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Never called: a checkpoint holds only tensors."""
        raise AssertionError("a checkpoint holds tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the part of a slot's memory that a read fills."""
        assert read_item.dest_index.index is not None
        data = self.slots[read_item.dest_index.index].data
        return data[read_item.dest_offsets[0] : read_item.dest_offsets[0] + read_item.lengths[0]]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: reads write to the slot's memory directly."""


def piece_key(name: str, start: int) -> str:
    """Return the name of a piece within its file."""
    return f"{name}@{start}"


def rank_file(rank: int) -> str:
    """Return the name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def flat_slot(name: str, shape: tuple[int, ...], start: int, data: Tensor) -> Slot:
    """Make a slot from the shape of the global tensor."""
    return Slot(name, prod(shape), start, data)


def _reads(number: int, slot: Slot, chunks: list[ChunkStorageMetadata]) -> list[ReadItem]:
    starts = [chunk.offsets[0] for chunk in chunks]
    items = []
    position, end = slot.start, slot.start + slot.data.numel()
    while position < end:
        at = bisect_right(starts, position) - 1
        length = min(end, starts[at] + chunks[at].sizes[0]) - position if at >= 0 else 0
        if length <= 0:
            raise CheckpointError(f"checkpoint tensor {slot.name} is incomplete at element {position}")
        items.append(
            ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=MetadataIndex(slot.name, index=number),
                dest_offsets=torch.Size([position - slot.start]),
                storage_index=MetadataIndex(slot.name, torch.Size([starts[at]])),
                storage_offsets=torch.Size([position - starts[at]]),
                lengths=torch.Size([length]),
            )
        )
        position += length
    return items
