"""Plans of ``torch.distributed.checkpoint`` over pieces of flattened global tensors.

A save asserts that the pieces of all ranks cover each global tensor exactly once; a load reads, for each piece that a rank
wants, the parts of the stored pieces that overlap it. Neither side knows the other's layout.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megamoe.errors import CheckpointError


@dataclass(frozen=True)
class Slot:
    """A piece as the planners see it: a range of the flattened global tensor ``name``, and its memory here."""

    name: str
    size: int
    start: int
    data: Tensor


class PieceSavePlanner(SavePlanner):
    """Writes each slot once; replicas of the same range on several ranks are written by the first."""

    def __init__(self, slots: list[Slot]):
        self.slots = {(slot.name, slot.start): slot for slot in slots}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """The slots are all there is."""

    def create_local_plan(self) -> SavePlan:
        """One write per slot of this rank."""
        return SavePlan([_write_item(slot) for slot in self.slots.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Drop replicas and check that every global tensor is covered exactly once."""
        seen: set[MetadataIndex] = set()
        chunks: dict[str, list[ChunkStorageMetadata]] = defaultdict(list)
        kinds: dict[str, tuple[TensorProperties, torch.Size]] = {}
        plans = []
        for plan in all_plans:
            items = [item for item in plan.items if item.index not in seen]
            seen.update(item.index for item in items)
            for item in items:
                assert item.tensor_data is not None
                chunks[item.index.fqn].append(item.tensor_data.chunk)
                kinds[item.index.fqn] = (item.tensor_data.properties, item.tensor_data.size)
            plans.append(SavePlan(items))
        tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for name, (properties, size) in kinds.items():
            ordered = sorted(chunks[name], key=lambda chunk: chunk.offsets[0])
            end = 0
            for chunk in ordered:
                assert chunk.offsets[0] == end, f"{name}: element {end} is covered by no rank or by two"
                end += chunk.sizes[0]
            assert end == size[0], f"{name}: {size[0] - end} elements are covered by no rank"
            tensors[name] = TensorStorageMetadata(properties, size, ordered)
        return plans, Metadata(tensors)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The global plan is final."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The memory of a slot."""
        assert write_item.index.offset is not None
        return self.slots[write_item.index.fqn, write_item.index.offset[0]].data


@dataclass
class PieceLoadPlanner(LoadPlanner):
    """Fills each slot from whatever pieces were stored; ``optional`` ones stay as they are if nothing was stored."""

    slots: list[Slot]
    optional: list[Slot] = field(default_factory=list)
    metadata: Metadata | None = field(default=None, init=False)

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Remember what is stored."""
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """The reads that fill this rank's slots.

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
        """Ranks read independently."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Nothing to change."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Never called: there are only tensors."""
        raise AssertionError("a checkpoint holds tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of a slot's memory that a read fills."""
        assert read_item.dest_index.index is not None
        data = self.slots[read_item.dest_index.index].data
        return data[read_item.dest_offsets[0] : read_item.dest_offsets[0] + read_item.lengths[0]]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Reads go to the slot's memory directly."""


def flat_slot(name: str, shape: tuple[int, ...], start: int, data: Tensor) -> Slot:
    """A slot from the shape of the global tensor."""
    return Slot(name, prod(shape), start, data)


def _write_item(slot: Slot) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size([slot.start]), torch.Size([slot.data.numel()]))
    properties = TensorProperties(dtype=slot.data.dtype)
    return WriteItem(
        index=MetadataIndex(slot.name, torch.Size([slot.start])),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, properties, torch.Size([slot.size])),
    )


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
