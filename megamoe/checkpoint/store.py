"""Store checkpoints as safetensors files and a JSON manifest, published by rename.

``step-00000100/`` holds ``manifest.json`` and one ``rank-00000.safetensors`` per writing rank; until it is complete it has
another name. Nothing in it is ever executed: it holds safetensors and JSON only, and file names cannot lead out of it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
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
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from megamoe.checkpoint.folders import incomplete_path, publish, sync_folder
from megamoe.checkpoint.manifest import (
    Manifest,
    StoredTensor,
    check_sizes,
    model_fingerprint,
    read_manifest,
    write_manifest,
)
from megamoe.checkpoint.pieces import piece_key, rank_file
from megamoe.checkpoint.tensorfile import FileSum, TensorFile, write_tensors
from megamoe.core.errors import CheckpointError

WEIGHT = "weight/"


def write_pieces(folder: Path, rank: int, pieces: Mapping[str, Tensor]) -> FileSum | None:
    """Write this rank's file of an incomplete checkpoint and flush it to the disk.

    Args:
        folder: The checkpoint; it is written under its incomplete name.
        rank: This rank.
        pieces: Flat tensors by :func:`piece_key`.

    Returns:
        What the manifest records about the file; None, and no file, if there are no pieces.

    Raises:
        CheckpointError: it cannot be written.
    """
    if not pieces:
        return None
    path = incomplete_path(folder) / rank_file(rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_tensors(path, pieces)
    except OSError as error:
        raise _cannot_write(path, error) from None


def complete(
    folder: Path,
    state: dict[str, Any],
    layout: str,
    files: Mapping[str, FileSum],
    tensors: Mapping[str, StoredTensor],
) -> None:
    """Write the manifest, which completes the folder, and publish it. One rank calls this once all files are written.

    Args:
        folder: The checkpoint.
        state: What the manifest records about the run.
        layout: The layout, in words.
        files: What the manifest records about each file.
        tensors: What is stored where.

    Raises:
        CheckpointError: it cannot be written.
    """
    incomplete = incomplete_path(folder)
    manifest = Manifest(
        written=datetime.now(UTC).isoformat(timespec="seconds"),
        layout=layout,
        model=model_fingerprint({n[len(WEIGHT) :]: t.size for n, t in tensors.items() if n.startswith(WEIGHT)}),
        state=state,
        files=files,
        tensors=tensors,
    )
    try:
        for path in incomplete.iterdir():
            if path.name not in files:  # left by an interrupted save of the same step
                path.unlink()
        write_manifest(incomplete, manifest)
        sync_folder(incomplete)
        publish(folder)
    except OSError as error:
        raise _cannot_write(incomplete, error) from None


class SafetensorsReader(StorageReader):
    """Reads ranges of stored pieces: only the blocks that are needed, each compared with its checksum.

    Args:
        folder: The checkpoint.
        all_files: Whether to check the size of every file, or only of those that are read.
    """

    def __init__(self, folder: Path, all_files: bool):
        self.folder, self._all_files = folder, all_files

    def reset(self, checkpoint_id: object = None) -> None:
        """Do nothing: a reader reads one checkpoint."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return what the manifest says is stored."""
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
        """Store where the pieces are."""
        self.places: dict[MetadataIndex, str] = metadata.storage_data
        if self._all_files:
            check_sizes(self.folder, self.manifest)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Change nothing."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Change nothing."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's slots, file by file, reading each from front to end."""
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
        """Accept folders only."""
        return isinstance(checkpoint_id, str | os.PathLike)


def _key(index: MetadataIndex) -> str:
    assert index.offset is not None
    return piece_key(index.fqn, index.offset[0])


def _cannot_write(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"checkpoint {path}: cannot be written ({error}); free space or move run.dir")
