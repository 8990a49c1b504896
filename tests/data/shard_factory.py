"""Make small real shards for tests: JPEGs, captions and tars."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import simplejpeg

from megamoe.data.shards.catalog import DataSet, Source
from megamoe.data.shards.index import learn_index

COLOURS = ("red", "green", "blue", "black")
Members = Sequence[tuple[str, bytes]]


def jpeg(seed: int = 0, side: int = 32) -> bytes:
    """Make a JPEG whose pixels depend on ``seed``."""
    steps = np.arange(side, dtype=np.int64)
    plane = (steps[:, None] * (seed % 7 + 1) + steps[None, :] * (seed % 5 + 2) + seed * 31) % 256
    data: bytes = simplejpeg.encode_jpeg(np.stack([plane, 255 - plane, plane // 2], axis=2).astype(np.uint8), quality=85)
    return data


def caption(n: int) -> str:
    """Make a caption whose length varies with ``n``."""
    return " ".join(["a", COLOURS[n % 4], "thing", *["far away"] * (n % 3), f"number {n}"])


def sample(n: int, image: bytes | None = None) -> list[tuple[str, bytes]]:
    """Return the members of sample ``n``."""
    return [(f"{n:05d}.jpg", jpeg(n) if image is None else image), (f"{n:05d}.txt", caption(n).encode())]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    """Write ``members`` unchanged, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_set(folder: Path, counts: Sequence[int], spoilt: dict[int, bytes] | None = None) -> DataSet:
    """Write and index shards of ``counts`` samples, numbered consecutively; ``spoilt``: other bytes for pictures."""
    spoilt = spoilt or {}
    shards, n = [], 0
    for number, count in enumerate(counts):
        members = [member for i in range(n, n + count) for member in sample(i, spoilt.get(i))]
        shards.append(write_tar(folder / f"{number:05d}.tar", members))
        n += count
    for shard in shards:
        learn_index(shard, None)
    return DataSet([Source("0", [str(shard) for shard in shards])])
