"""Bytes of a member, by shard and offset, from files that stay open."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

from megamoe.data.tar import BLOCK, checksum_is_right, header_size
from megamoe.errors import DataError


class Storage:
    """Reads members of local shards. One per process; at most ``open_files`` files are open at a time.

    The default keeps the shards of one shuffle window open and stays far below the usual limit of 1,024 descriptors.
    """

    def __init__(self, open_files: int = 128) -> None:
        self._limit = open_files
        self._open: OrderedDict[Path, int] = OrderedDict()

    def read(self, shard: Path, offset: int, size: int) -> bytes:
        """The ``size`` bytes at ``offset`` of ``shard``.

        The tar header in front of them is read along and must be whole and name the same size: a shard that was
        replaced after it was indexed gives an error, not the bytes of another sample.

        Raises:
            DataError: the shard cannot be read, ends too early, or is not what was indexed.
        """
        start, want = offset - BLOCK, size + BLOCK
        pieces = []
        try:
            file = self._descriptor(shard)
            while want:  # one call may return less than asked for (2 GiB, interrupted network reads)
                piece = os.pread(file, want, start)
                if not piece:
                    raise DataError(
                        f"shard {shard}: ends at byte {start}, within the member at byte {offset}; copy it again"
                    )
                pieces.append(piece)
                start += len(piece)
                want -= len(piece)
        except OSError as error:
            raise DataError(f"shard {shard}: cannot be read at byte {offset} ({error.strerror})") from error
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if not _describes(data[:BLOCK], size):
            raise DataError(
                f"shard {shard}: changed at byte {offset} since it was indexed; run `megamoe data index {shard}`"
            )
        return data[BLOCK:]

    def close(self) -> None:
        """Close all files; the next read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, shard: Path) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            if len(self._open) >= self._limit:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[shard]


def _describes(header: bytes, size: int) -> bool:
    try:
        return checksum_is_right(header) and header_size(header) == size
    except ValueError:
        return False
