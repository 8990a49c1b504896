"""The manifest of a checkpoint: what is stored where, with checksums of every file and of itself.

``manifest.json`` holds ``format``, ``written`` (time, UTC), ``layout`` (the one that wrote it; for people, not needed to
load), ``model`` (fingerprint of the names and sizes of all weights), ``state`` (a ``TrainState``, with the config, the
fingerprints of tokenizer and data, and versions), ``files`` (size and checksums of blocks), ``tensors``
(size, dtype and pieces ``[first element, elements, file]``) and ``checksum`` (over all other fields).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe.checkpoint.tensorfile import BLOCK, FileSum, block_sum, check_size
from megamoe.core.errors import CheckpointError, DamagedCheckpoint

FORMAT = 2
MANIFEST = "manifest.json"
_FILE = re.compile(r"rank-\d{5,}\.safetensors")
_SUM = re.compile(r"[0-9a-f]{16}")
_DTYPES = ("float32", "uint8")


@dataclass(frozen=True)
class StoredTensor:
    """A flat global tensor: its elements, torch dtype, and pieces (first element, elements, file) in order."""

    size: int
    dtype: str
    pieces: tuple[tuple[int, int, str], ...]


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``; the module docstring lists the fields."""

    written: str
    layout: str
    model: str
    state: dict[str, Any]
    files: Mapping[str, FileSum]
    tensors: Mapping[str, StoredTensor]

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(file.size for file in self.files.values())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` and flush it to the disk.

    Raises:
        OSError: it cannot be written.
    """
    tree = {
        "format": FORMAT,
        "written": manifest.written,
        "layout": manifest.layout,
        "model": manifest.model,
        "state": manifest.state,
        "files": {name: {"size": file.size, "blocks": file.blocks} for name, file in manifest.files.items()},
        "tensors": {
            name: {"size": tensor.size, "dtype": tensor.dtype, "pieces": tensor.pieces}
            for name, tensor in manifest.tensors.items()
        },
    }
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(json.dumps(tree | {"checksum": _checksum(tree)}))
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        DamagedCheckpoint: it is missing, or is not what was written.
        CheckpointError: another version of MegaMoE wrote it.
    """
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DamagedCheckpoint(f"checkpoint {folder}: no readable {MANIFEST} ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder}: {MANIFEST} is not valid JSON ({error}): damaged") from None
    if not isinstance(tree, dict) or "format" not in tree:
        raise DamagedCheckpoint(f"checkpoint {folder}: {MANIFEST} names no format: damaged")
    checksum = tree.pop("checksum", None)
    right = checksum == _checksum(tree)
    if tree["format"] != FORMAT and (right or checksum is None):  # the first format had no checksum
        raise CheckpointError(
            f"checkpoint {folder}: has format {tree['format']!r}, not {FORMAT}; use the version of MegaMoE that wrote it"
        )
    if not right:
        raise DamagedCheckpoint(f"checkpoint {folder}: {MANIFEST} does not have its checksum: damaged")
    try:
        files = {name: FileSum(file["size"], tuple(file["blocks"])) for name, file in tree["files"].items()}
        for name, file in files.items():
            _check_file(name, file)
        tensors = {name: _tensor(stored, files) for name, stored in tree["tensors"].items()}
        return Manifest(tree["written"], tree["layout"], tree["model"], tree["state"], files, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder}: {MANIFEST} is malformed ({error})") from None


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Compare the size of every file with the manifest: a quick check that finds cut and missing files.

    Raises:
        DamagedCheckpoint: names the first file that is missing or has another size.
    """
    for name, file in manifest.files.items():
        check_size(folder / name, file)


def model_fingerprint(sizes: Mapping[str, int]) -> str:
    """Return the SHA-256 over the names and sizes (elements) of a model's weights."""
    return hashlib.sha256(json.dumps(sorted(sizes.items())).encode()).hexdigest()


def _checksum(tree: dict[str, Any]) -> str:
    # Over the content rather than the bytes: a reformatted manifest is still good.
    return block_sum(json.dumps(tree, separators=(",", ":")).encode())


def _check_file(name: str, file: FileSum) -> None:
    # The name is untrusted: it must not lead out of the folder.
    if not _FILE.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a checkpoint file")
    if type(file.size) is not int or len(file.blocks) != -(-file.size // BLOCK):
        raise ValueError(f"{name} has {len(file.blocks)} checksums for {file.size} bytes")
    if not all(_SUM.fullmatch(block) for block in file.blocks):
        raise ValueError(f"{name} has a malformed checksum")


def _tensor(stored: dict[str, Any], files: Mapping[str, FileSum]) -> StoredTensor:
    pieces = []
    for start, count, file in stored["pieces"]:
        if file not in files:
            raise ValueError(f"{file!r} is not among its files")
        if type(start) is not int or type(count) is not int or start < 0 or count < 1:
            raise ValueError(f"{start!r}, {count!r} is not a range")
        pieces.append((start, count, file))
    if type(stored["size"]) is not int or stored["dtype"] not in _DTYPES:
        raise ValueError(f"size {stored['size']!r} or dtype {stored['dtype']!r}")
    return StoredTensor(stored["size"], stored["dtype"], tuple(sorted(pieces)))
