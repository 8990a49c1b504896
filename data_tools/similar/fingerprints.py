"""Compute the fingerprints that `megamoe data dedup` compares, once per shard, and keep them in a file until it ends."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from data_tools.checks.sample_parts import caption_of, picture_of
from data_tools.similar.perceptual import perceptual_hash
from data_tools.writing.account import Account, whole_records
from data_tools.writing.records import Record
from megamoe.core.files import atomic_file
from megamoe.data.sample.decode import CorruptSample

By = Literal["image", "image+caption", "near"]
_WIDTH = {"image": 32, "image+caption": 32, "near": 8}


@dataclass(frozen=True)
class ShardToHash:
    """A shard to fingerprint, and the file for its fingerprints."""

    name: str
    source: Path
    label: str
    by: By
    target: Path


@dataclass(frozen=True)
class Fingerprints:
    """The fingerprints of the n samples of a shard: ``values`` is uint8 (n, 32 or 8), valid where ``comparable`` (n,)."""

    values: npt.NDArray[np.uint8]
    comparable: npt.NDArray[np.bool_]


def hash_shard(job: ShardToHash) -> Account:
    """Write the fingerprints of a shard's samples. The account tells what was read and lost."""
    account = Account()
    keys, values = [], []
    for record in whole_records(job.source, job.label, account):
        account.kept += 1
        keys.append(record.key)
        values.append(_fingerprint(record, job.by))
    width = _WIDTH[job.by]
    packed = b"".join(value or bytes(width) for value in values)
    with atomic_file(job.target) as file:
        np.savez(
            file,
            allow_pickle=False,
            keys=np.frombuffer(json.dumps(keys).encode(), dtype=np.uint8),
            values=np.frombuffer(packed, dtype=np.uint8).reshape(-1, width),
            comparable=np.array([value is not None for value in values], dtype=np.bool_),
        )
    return account


def load_fingerprints(path: Path) -> Fingerprints:
    """Load what :func:`hash_shard` wrote to ``path``."""
    with np.load(path, allow_pickle=False) as arrays:
        return Fingerprints(arrays["values"], arrays["comparable"])


def load_keys(path: Path) -> list[str]:
    """Load the keys of the samples that :func:`hash_shard` wrote to ``path``."""
    with np.load(path, allow_pickle=False) as arrays:
        return [str(key) for key in json.loads(arrays["keys"].tobytes())]


def _fingerprint(record: Record, by: By) -> bytes | None:
    """Return the fingerprint of a sample; None if there is nothing to compare."""
    image = picture_of(record)
    if image is None:
        return None
    if by == "near":
        try:
            value = perceptual_hash(image)
        except CorruptSample:
            return None
        return None if value is None else value.to_bytes(8, "big")
    digest = hashlib.sha256(image).digest()
    if by == "image":
        return digest
    caption = caption_of(record)
    return None if caption is None else hashlib.sha256(digest + caption.encode("utf-8")).digest()
