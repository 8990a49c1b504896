"""Storage of ``torch.distributed.checkpoint``: safetensors files, a JSON manifest, and publication by rename.

``step-00000100/`` holds ``manifest.json`` and one ``rank-00000.safetensors`` per writing rank; while it is written it has
another name. Nothing in it is ever executed: safetensors and JSON only, and names of files may not lead out of the folder.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megamoe.checkpoint.folders import incomplete_path, sync_folder
from megamoe.checkpoint.manifest import (
    Manifest,
    StoredTensor,
    check_sizes,
    model_fingerprint,
    read_manifest,
    write_manifest,
)
from megamoe.checkpoint.tensorfile import FileSum, TensorFile, write_tensors
from megamoe.errors import CheckpointError

WEIGHT = "weight/"


@dataclasses.dataclass(frozen=True)
class _Written:
    """Where a piece was written; the file's checksums are one object for all pieces of a rank."""

    file: str
    sums: FileSum


class SafetensorsWriter(StorageWriter):
    """Writes one safetensors file per rank and, on the coordinator, the manifest.

    Args:
        folder: The checkpoint; it is written under its incomplete name.
        rank: This rank.
        state: What the manifest says of the run.
        layout: The layout, in words.
    """

    def __init__(self, folder: Path, rank: int, state: dict[str, Any], layout: str):
        self.folder, self.rank, self.state, self.layout = incomplete_path(folder), rank, state, layout

    def reset(self, checkpoint_id: object = None) -> None:
        """One writer, one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Make the folder; the coordinator starts from an empty one before the others write (they wait for its plan)."""
        if is_coordinator:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Nothing to add."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file and bring it to the disk."""
        tensors = {}
        for item in plan.items:
            data = planner.resolve_data(item)
            assert isinstance(data, torch.Tensor)
            tensors[_key(item.index)] = data
        results = []
        if tensors:
            path = self.folder / f"rank-{self.rank:05d}.safetensors"
            try:
                written = _Written(path.name, write_tensors(path, tensors))
            except OSError as error:
                raise _cannot_write(path, error) from None
            for item in plan.items:
                data = tensors[_key(item.index)]
                results.append(WriteResult(item.index, data.numel() * data.element_size(), written))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest: it makes the folder complete."""
        places: dict[MetadataIndex, _Written] = {w.index: w.storage_data for rank in results for w in rank}
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            pieces = tuple(
                (chunk.offsets[0], chunk.sizes[0], places[MetadataIndex(name, chunk.offsets)].file)
                for chunk in stored.chunks
            )
            dtype = str(stored.properties.dtype).removeprefix("torch.")
            tensors[name] = StoredTensor(stored.size[0], dtype, pieces)
        manifest = Manifest(
            written=datetime.now(UTC).isoformat(timespec="seconds"),
            layout=self.layout,
            model=model_fingerprint({n[len(WEIGHT) :]: t.size for n, t in tensors.items() if n.startswith(WEIGHT)}),
            state=self.state,
            files={written.file: written.sums for written in places.values()},
            tensors=tensors,
        )
        try:
            write_manifest(self.folder, manifest)
            sync_folder(self.folder)
        except OSError as error:
            raise _cannot_write(self.folder, error) from None

    def storage_meta(self) -> StorageMeta | None:
        """None: the manifest says it all."""
        return None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Folders only."""
        return isinstance(checkpoint_id, str | os.PathLike)


class SafetensorsReader(StorageReader):
    """Reads ranges of stored pieces: only the blocks that are wanted, each held against its checksum."""

    def __init__(self, folder: Path):
        self.folder = folder

    def reset(self, checkpoint_id: object = None) -> None:
        """One reader, one checkpoint."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """What the manifest says is stored."""
        self.manifest = read_manifest(self.folder)
        tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        places = {}
        for name, stored in self.manifest.tensors.items():
            chunks = []
            for start, count, file in stored.pieces:
                chunks.append(ChunkStorageMetadata(torch.Size([start]), torch.Size([count])))
                places[MetadataIndex(name, torch.Size([start]))] = file
            properties = TensorProperties(dtype=getattr(torch, stored.dtype))
            tensors[name] = TensorStorageMetadata(properties, torch.Size([stored.size]), chunks)
        return Metadata(tensors, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Remember where the pieces lie. The coordinator looks at every file, the others at those that they read."""
        self.places: dict[MetadataIndex, str] = metadata.storage_data
        if is_coordinator:
            check_sizes(self.folder, self.manifest)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to add."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's slots, file by file, from the front of each to its end."""
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self.places[item.storage_index]].append(item)
        for name, items in sorted(by_file.items()):
            with TensorFile(self.folder / name, self.manifest.files[name]) as file:
                order = {key: number for number, key in enumerate(file.entries)}
                items.sort(key=lambda item: (order.get(_key(item.storage_index), 0), item.storage_offsets[0]))
                for item in items:
                    file.read(_key(item.storage_index), item.storage_offsets[0], planner.resolve_tensor(item))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Folders only."""
        return isinstance(checkpoint_id, str | os.PathLike)


def piece_key(name: str, start: int) -> str:
    """Name of a piece within its file."""
    return f"{name}@{start}"


def _key(index: MetadataIndex) -> str:
    assert index.offset is not None
    return piece_key(index.fqn, index.offset[0])


def _cannot_write(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"checkpoint {path}: cannot be written ({error}); free space or move run.dir")
