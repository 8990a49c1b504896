"""Hold the names of hundreds of thousands of shards in little memory: every process of a node has them."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

_BLOCK = 128  # names compressed together; reading one unpacks its block, which takes some microseconds
_END = b"\0"  # occurs in no file name and no URL


class ShardNames(Sequence[str]):
    """A compressed list of names: 217,000 that differ in a number take one megabyte and not nineteen."""

    def __init__(self, names: Iterable[str]) -> None:
        blocks, self._count = [], 0
        remaining = iter(names)
        while block := [os.fsencode(name) for name in itertools.islice(remaining, _BLOCK)]:
            blocks.append(zlib.compress(_END.join(block), 6))
            self._count += len(block)
        self._data = b"".join(blocks)
        self._ends = np.cumsum([len(block) for block in blocks], dtype=np.int64)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[n] for n in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        block, within = divmod(place % len(self), _BLOCK)
        return os.fsdecode(self._block(block)[within])

    def __iter__(self) -> Iterator[str]:
        for block in range(len(self._ends)):
            yield from map(os.fsdecode, self._block(block))

    def _block(self, block: int) -> list[bytes]:
        start = int(self._ends[block - 1]) if block else 0
        return zlib.decompress(self._data[start : int(self._ends[block])]).split(_END)


def name_hashes(names: Iterable[str]) -> npt.NDArray[np.int64]:
    """Return a number for each name, equal for equal names, to find repeated names without keeping them all."""
    return np.fromiter(map(hash, names), dtype=np.int64)


def repeated(hashes: npt.NDArray[np.int64]) -> frozenset[int]:
    """Return the numbers that occur more than once. Very rarely, the names behind one differ."""
    ordered = np.sort(hashes)
    return frozenset(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
