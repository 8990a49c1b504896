"""A safetensors file with a checksum per block: reading a range checks exactly the blocks that it overlaps.

XXH3 (64 bits) finds flipped bits at 23 GiB/s on one core; SHA-256 reaches 1.5 and would be slower than the disk. XXH3 does
not protect against forgery and need not: nothing in a checkpoint is executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from megamoe.core.errors import DamagedCheckpoint

BLOCK = 4 << 20  # 1 TB of checkpoint has 5 MB of checksums; a rank that needs one number reads 4 MiB
_NAMES = {torch.float32: "F32", torch.uint8: "U8"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class FileSum:
    """Size in bytes, and the checksum of each block of ``BLOCK`` bytes as 16 hexadecimal digits."""

    size: int
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its dtype, its number of elements, and its range of bytes."""

    dtype: torch.dtype
    count: int
    start: int
    end: int


def block_sum(block: Any) -> str:
    """Return the checksum of one block of bytes."""
    return xxhash.xxh3_64_hexdigest(block)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileSum:
    """Stream flat tensors into a safetensors file, flush it to the disk, and return its checksums.

    The safetensors library refuses views that share memory. All our pieces do, as ranges of flat buffers, and cloning them
    would double the host memory of a save. The format: length of the header, JSON header, bytes.

    Raises:
        OSError: it cannot be written.
    """
    header, end = {}, 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _NAMES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        blocks = _BlockSums()
        head = memoryview(len(text).to_bytes(8, "little") + text)
        for view in chain([head], map(_bytes_of, tensors.values())):  # from a GPU, one tensor at a time
            for at in range(0, len(view), BLOCK):  # in small parts, so that they are still in the cache for the checksum
                file.write(view[at : at + BLOCK])
                blocks.add(view[at : at + BLOCK])
        file.flush()
        os.fsync(file.fileno())
    return FileSum(len(text) + 8 + end, blocks.finish())


class TensorFile:
    """A file of a checkpoint, open for reading. It compares every byte that it returns with its checksum.

    Args:
        path: The file.
        expected: Size and checksums from the manifest.

    Raises:
        DamagedCheckpoint: it is missing, has another size, or its beginning is damaged.
    """

    def __init__(self, path: Path, expected: FileSum):
        self._path, self._expected, self._number = path, expected, -1
        check_size(path, expected)
        try:
            self._file: BinaryIO = path.open("rb", buffering=0)
        except OSError as error:
            raise DamagedCheckpoint(f"checkpoint {path}: cannot be read ({error.strerror})") from None
        try:
            self._buffer = memoryview(bytearray(min(BLOCK, expected.size)))
            self.entries = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def read(self, key: str, first: int, into: Tensor) -> None:
        """Fill ``into`` (n,) with elements ``first`` to ``first + n`` of a tensor.

        Raises:
            DamagedCheckpoint: there is no such range, or it is damaged.
        """
        entry = self.entries.get(key)
        if entry is None or entry.dtype != into.dtype or first + into.numel() > entry.count:
            raise DamagedCheckpoint(f"checkpoint {self._path}: has no {into.numel()} elements of {key}: damaged")
        start, target = entry.start + first * into.element_size(), into.view(torch.uint8)
        done, end = 0, target.numel()
        while done < end:
            number, skipped = divmod(start + done, BLOCK)
            count = min(end - done, BLOCK - skipped)
            part = target[done : done + count]
            if count == BLOCK and into.device.type == "cpu":  # read a whole block straight to its place
                self._fill(_bytes_of(part), number)
            else:
                for piece in self._parts(start + done, start + done + count):
                    part.copy_(torch.frombuffer(piece, dtype=torch.uint8))
            done += count

    def check_blocks(self) -> Iterator[int]:
        """Read the whole file, block by block; yield the size of each good one.

        Raises:
            DamagedCheckpoint: a block is not what was written.
        """
        for part in self._parts(0, self._expected.size):
            yield len(part)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def _parts(self, start: int, end: int) -> Iterator[memoryview]:
        """Yield bytes ``start`` to ``end``; each part is valid until the next."""
        while start < end:
            number = start // BLOCK
            self._load(number)
            stop = min(end, (number + 1) * BLOCK)
            yield self._buffer[start - number * BLOCK : stop - number * BLOCK]
            start = stop

    def _load(self, number: int) -> None:
        if number == self._number:  # small neighbours share a block
            return
        self._number = -1
        self._fill(self._buffer[: min(BLOCK, self._expected.size - number * BLOCK)], number)
        self._number = number

    def _fill(self, into: memoryview, number: int) -> None:
        """Read a whole block into ``into`` and compare its checksum."""
        start, filled = number * BLOCK, 0
        try:
            self._file.seek(start)
            while filled < len(into):
                count = self._file.readinto(into[filled:])  # type: ignore[attr-defined]
                if not count:
                    raise OSError(0, "the file has become shorter")
                filled += count
        except OSError as error:
            raise DamagedCheckpoint(f"checkpoint {self._path}: cannot be read ({error.strerror})") from None
        if block_sum(into) != self._expected.blocks[number]:
            raise DamagedCheckpoint(
                f"checkpoint {self._path}: bytes {start} to {start + len(into)} do not have the checksum that they were "
                "written with: damaged"
            )

    def _read_header(self) -> dict[str, Entry]:
        size = self._expected.size
        try:
            length = int.from_bytes(self._range(0, min(8, size)), "little")
            if length > size - 8:
                raise ValueError("the header is longer than the file")
            entries = {}
            for key, entry in json.loads(self._range(8, 8 + length)).items():
                dtype, (count,) = _DTYPES[entry["dtype"]], entry["shape"]
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                if not 8 + length <= start <= end <= size or end - start != count * dtype.itemsize:
                    raise ValueError(f"{key} lies outside of the file")
                entries[key] = Entry(dtype, count, start, end)
            return entries
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedCheckpoint(f"checkpoint {self._path}: its header cannot be read ({error}): damaged") from None

    def _range(self, start: int, end: int) -> bytes:
        return b"".join(bytes(part) for part in self._parts(start, end))


def check_size(path: Path, expected: FileSum) -> None:
    """Compare a file's size with the manifest.

    Raises:
        DamagedCheckpoint: it is missing or has another size.
    """
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DamagedCheckpoint(f"checkpoint {path}: file is missing") from None
    except OSError as error:
        raise DamagedCheckpoint(f"checkpoint {path}: cannot be read ({error.strerror})") from None
    if size != expected.size:
        raise DamagedCheckpoint(f"checkpoint {path}: has {size} bytes, not {expected.size}: damaged")


class _BlockSums:
    """Checksums of consecutive blocks of a stream that arrives in parts of any size."""

    def __init__(self) -> None:
        self._sums: list[str] = []
        self._hash, self._filled = xxhash.xxh3_64(), 0

    def add(self, part: memoryview) -> None:
        while len(part):
            taken = part[: BLOCK - self._filled]
            self._hash.update(taken)
            self._filled += len(taken)
            part = part[len(taken) :]
            if self._filled == BLOCK:
                self._close()

    def finish(self) -> tuple[str, ...]:
        if self._filled:
            self._close()
        return tuple(self._sums)

    def _close(self) -> None:
        self._sums.append(self._hash.hexdigest())
        self._hash, self._filled = xxhash.xxh3_64(), 0


def _bytes_of(tensor: Tensor) -> memoryview:
    array: Any = tensor.detach().cpu().numpy().view("uint8")
    return memoryview(array)
