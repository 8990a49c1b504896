"""Pictures that are like photographs in what matters to a loader: 224 pixels square, about 27 KB as JPEG, no two alike."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE = 224
_SCALES = ((4, 70.0), (14, 40.0), (56, 22.0))  # cells across, and how much they differ: large shapes to texture
_GRAIN = (4.0, 22.0)  # of a picture's noise, which decides how well it compresses
_QUALITY = 90
_WORDS = ["a", "the", "two", "red", "small", "old", "bright", "photograph", "house", "street", "river", "dog", "of", "near"]


def make_pictures(folder: Path, count: int) -> list[Path]:
    """The JPEGs ``folder/000000.jpg`` ..., each beside a ``.txt`` with its caption. Made once, the same every time."""
    listing = folder / "complete.json"
    if not listing.exists() or json.loads(listing.read_text())["count"] != count:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / f"{number:06d}.jpg").write_bytes(_jpeg(number))
            (folder / f"{number:06d}.txt").write_text(_caption(number))
        listing.write_text(json.dumps({"count": count}))
    return [folder / f"{number:06d}.jpg" for number in range(count)]


def read_pictures(jpegs: Sequence[Path]) -> Iterator[tuple[str, bytes, str]]:
    """Key, JPEG and caption of each."""
    for jpeg in jpegs:
        yield jpeg.stem, jpeg.read_bytes(), jpeg.with_suffix(".txt").read_text()


def write_tars(jpegs: Sequence[Path], folder: Path, per_shard: int) -> None:
    """WebDataset shards of them, ``folder/00000.tar`` ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, first in enumerate(range(0, len(jpegs), per_shard)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, jpeg, caption in read_pictures(jpegs[first : first + per_shard]):
                for name, data in ((f"{key}.jpg", jpeg), (f"{key}.txt", caption.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def _jpeg(number: int) -> bytes:
    rng = np.random.default_rng([1, number])
    field = np.full((SIDE, SIDE, 3), 128, dtype=np.float32)
    for cells, strength in _SCALES:
        for channel in range(3):
            field[:, :, channel] += _smooth(rng.normal(0, strength, (cells, cells)).astype(np.float32))
    field += rng.normal(0, rng.uniform(*_GRAIN), (SIDE, SIDE, 1))
    file = io.BytesIO()
    Image.fromarray(np.clip(field, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _smooth(grid: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray(Image.fromarray(grid).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _caption(number: int) -> str:
    rng = np.random.default_rng([2, number])
    return " ".join(rng.choice(_WORDS, int(rng.integers(5, 14))))
