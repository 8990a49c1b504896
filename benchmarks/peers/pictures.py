"""Read the pictures of benchmarks/data_peers.py and write them as tars. Must not import megamoe: peers lack it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path


def read_pictures(jpegs: Sequence[Path]) -> Iterator[tuple[str, bytes, str]]:
    """Yield key, JPEG and caption of each picture."""
    for jpeg in jpegs:
        yield jpeg.stem, jpeg.read_bytes(), jpeg.with_suffix(".txt").read_text()


def write_tars(jpegs: Sequence[Path], folder: Path, per_shard: int) -> None:
    """Write the pictures as WebDataset shards, ``folder/00000.tar`` ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, first in enumerate(range(0, len(jpegs), per_shard)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, jpeg, caption in read_pictures(jpegs[first : first + per_shard]):
                for name, data in ((f"{key}.jpg", jpeg), (f"{key}.txt", caption.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
