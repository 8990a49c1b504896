"""Map the arrays of an uncompressed ``npz`` file into memory: processes share its pages, and nothing is copied."""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_NPY_HEAD = 4096  # bytes that hold an array's own header; NumPy writes 128 for such arrays


def map_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Map the arrays of an ``npz`` read-only: all processes of a node share one copy of the file's pages.

    Raises:
        OSError, ValueError, ...: the file is missing or damaged.
    """
    arrays = {}
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        for member in archive.infolist():
            # Lengths of the name and of the extra field before the data.
            lengths = struct.unpack_from("<HH", whole, member.header_offset + 26)
            start = member.header_offset + 30 + sum(lengths)
            content = whole[start : start + member.file_size]
            if member.compress_type != zipfile.ZIP_STORED or zlib.crc32(content) != member.CRC:
                raise ValueError("wrong CRC")
            shape, dtype, first = _array_head(bytes(content[:_NPY_HEAD]))
            array: npt.NDArray[Any] = np.ndarray(shape, dtype, content, first)
            arrays[member.filename.removesuffix(".npy")] = array
    return arrays


def _array_head(content: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return shape and type of an array from its first bytes, and the offset of its numbers."""
    length = len(_NPY_MAGIC) + 2 + int.from_bytes(content[len(_NPY_MAGIC) : len(_NPY_MAGIC) + 2], "little")
    return *_parsed(content[:length]), length


@lru_cache(1024)  # NumPy takes 30 us to parse one, and the shards of a set are of equal size
def _parsed(head: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    file = io.BytesIO(head)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of the format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran or dtype.hasobject:
        raise ValueError("not plain rows of numbers")
    return shape, dtype
