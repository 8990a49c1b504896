"""Checkpoints on disk: safetensors files, a JSON manifest, and publication by rename. The only code that touches the disk.

``step-00000100/`` holds ``manifest.json`` and one ``rank-00000.safetensors`` per writing rank. While it is written it is
called ``.incomplete-step-00000100``; a folder with the final name is complete. Nothing in it is ever executed: safetensors
and JSON only, and names of files may not lead out of the folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
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

from megamoe.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"rank-\d{5,}\.safetensors")
_DTYPES = {"float32": torch.float32, "uint8": torch.uint8}
_INCOMPLETE = ".incomplete-"


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` optimizer steps."""
    return f"step-{step:08d}"


def checkpoints_of(run: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run as (step, folder), oldest first."""
    found = []
    for folder in (run / "checkpoints").glob("step-*"):
        match = _NAME.fullmatch(folder.name)
        if match and (folder / MANIFEST).is_file():
            found.append((int(match[1]), folder))
    return sorted(found)


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, if there is one."""
    found = checkpoints_of(run)
    return found[-1][1] if found else None


def incomplete_path(folder: Path) -> Path:
    """Where a checkpoint is written before it gets its final name."""
    return folder.with_name(_INCOMPLETE + folder.name)


def remove_incomplete(run: Path) -> list[Path]:
    """Delete what an interrupted save left behind. Returns the folders deleted."""
    left = sorted((run / "checkpoints").glob(f"{_INCOMPLETE}step-*"))
    for folder in left:
        shutil.rmtree(folder)
    return left


def publish(folder: Path) -> None:
    """Give a completely written checkpoint its final name; it replaces one of the same step."""
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(incomplete_path(folder), folder)
    _sync_folder(folder.parent)


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for _, folder in checkpoints_of(run)[:-keep]:
        shutil.rmtree(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is not one of ours.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder}: no readable {MANIFEST} ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST} is not valid JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST} is not of format {FORMAT}")
    return manifest


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a stored piece lies."""

    file: str
    key: str


class SafetensorsWriter(StorageWriter):
    """Writes one safetensors file per rank and, on the coordinator, the manifest with ``state`` in it."""

    def __init__(self, folder: Path, rank: int, state: dict[str, Any]):
        self.folder, self.rank, self.state = incomplete_path(folder), rank, state

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
        tensors, results = {}, []
        name = f"rank-{self.rank:05d}.safetensors"
        for item in plan.items:
            data = planner.resolve_data(item)
            assert isinstance(data, torch.Tensor) and item.index.offset is not None
            key = f"{item.index.fqn}@{item.index.offset[0]}"
            tensors[key] = data
            results.append(WriteResult(item.index, data.numel() * data.element_size(), _Place(name, key)))
        if tensors:
            path = self.folder / name
            try:
                _write_safetensors(path, tensors)
            except OSError as error:
                raise CheckpointError(
                    f"checkpoint {path}: cannot be written ({error}); free space or move run.dir"
                ) from None
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest: it makes the folder complete."""
        places = {result.index: result.storage_data for rank in results for result in rank}
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            pieces = []
            for chunk in stored.chunks:
                place = places[MetadataIndex(name, chunk.offsets)]
                pieces.append([chunk.offsets[0], chunk.sizes[0], place.file])
            dtype = str(stored.properties.dtype).removeprefix("torch.")
            tensors[name] = {"size": stored.size[0], "dtype": dtype, "pieces": pieces}
        files = {path.name: path.stat().st_size for path in sorted(self.folder.glob("rank-*.safetensors"))}
        manifest = {"format": FORMAT, "state": self.state, "files": files, "tensors": tensors}
        path = self.folder / MANIFEST
        try:
            path.write_text(json.dumps(manifest), encoding="utf-8")
            _sync_file(path)
            _sync_folder(self.folder)
        except OSError as error:
            raise CheckpointError(f"checkpoint {path}: cannot be written ({error}); free space or move run.dir") from None

    def storage_meta(self) -> StorageMeta | None:
        """None: the manifest says it all."""
        return None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Folders only."""
        return isinstance(checkpoint_id, str | os.PathLike)


class SafetensorsReader(StorageReader):
    """Reads ranges of stored pieces; only the bytes that are wanted."""

    def __init__(self, folder: Path):
        self.folder = folder

    def reset(self, checkpoint_id: object = None) -> None:
        """One reader, one checkpoint."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """What the manifest says is stored, checked against the sizes of the files."""
        manifest = read_manifest(self.folder)
        try:
            for name, size in manifest["files"].items():
                if not _FILE.fullmatch(name):
                    raise CheckpointError(f"checkpoint {self.folder}: {name!r} is no name of a checkpoint file")
                actual = (self.folder / name).stat().st_size
                if actual != size:
                    raise CheckpointError(f"checkpoint {self.folder / name}: has {actual} bytes, not {size}: damaged")
            tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
            places = {}
            for name, stored in manifest["tensors"].items():
                chunks = []
                for start, count, file in stored["pieces"]:
                    if file not in manifest["files"]:
                        raise CheckpointError(f"checkpoint {self.folder}: {file!r} is not among its files")
                    chunks.append(ChunkStorageMetadata(torch.Size([start]), torch.Size([count])))
                    places[MetadataIndex(name, torch.Size([start]))] = _Place(file, f"{name}@{start}")
                chunks.sort(key=lambda chunk: chunk.offsets[0])
                properties = TensorProperties(dtype=_DTYPES[stored["dtype"]])
                tensors[name] = TensorStorageMetadata(properties, torch.Size([stored["size"]]), chunks)
        except FileNotFoundError as error:
            raise CheckpointError(f"checkpoint {error.filename}: file is missing") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"checkpoint {self.folder}: {MANIFEST} is malformed ({error!r})") from None
        return Metadata(tensors, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Remember where the pieces lie."""
        self.places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to add."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's slots, file by file."""
        by_file: dict[str, list[tuple[str, ReadItem]]] = defaultdict(list)
        for item in plan.items:
            place = self.places[item.storage_index]
            by_file[place.file].append((place.key, item))
        for name, reads in by_file.items():
            path = self.folder / name
            try:
                with safe_open(path, framework="pt") as file:
                    for key, item in reads:
                        start = item.storage_offsets[0]
                        part = file.get_slice(key)[start : start + item.lengths[0]]
                        planner.resolve_tensor(item).copy_(part)
            except (OSError, SafetensorError, RuntimeError) as error:
                raise CheckpointError(f"checkpoint {path}: cannot be read ({error}): damaged") from None
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Folders only."""
        return isinstance(checkpoint_id, str | os.PathLike)


def _write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Stream tensors into a safetensors file and bring it to the disk.

    The library's own writer refuses views that share memory, which all our pieces do (they are ranges of flat buffers);
    cloning them would double the host memory of a save. The format: length of the header, JSON header, bytes.
    """
    header, end = {}, 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        kind = {torch.float32: "F32", torch.uint8: "U8"}[tensor.dtype]
        header[key] = {"dtype": kind, "shape": [tensor.numel()], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            tensor.detach().cpu().numpy().tofile(file)
        file.flush()
        os.fsync(file.fileno())


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
