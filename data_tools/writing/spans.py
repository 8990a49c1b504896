"""Record where each sample lies in its tar, for tools that read samples in another order than that of the shards."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.writing.account import Account
from data_tools.writing.records import Record
from megamoe.core.errors import DataError
from megamoe.core.files import atomic_file
from megamoe.data.shards.index import groups
from megamoe.data.shards.tar import BLOCK, Member, open_for_walk, walk

# start, length: the bytes of the tar with all headers and contents of the sample; size: its bytes in a new tar
SPAN = np.dtype([("start", "<i8"), ("length", "<i8"), ("size", "<i8")])
_PLAIN_NAME = 90  # a name of up to so many ASCII characters needs one header, even if its key gets a suffix
_PLAIN_HEADER, _LONG_HEADER = BLOCK, 4 * BLOCK
_END = bytes(2 * BLOCK)


@dataclass(frozen=True)
class ShardToScan:
    """A shard to scan, and the file for the spans of its samples."""

    name: str
    source: Path
    label: str
    target: Path


def scan_shard(job: ShardToScan) -> Account:
    """Write the spans of a shard's samples, an array of ``SPAN`` in the order of the tar, as raw bytes.

    Only headers are read. The account tells what was read and lost, by the rules of
    :func:`data_tools.writing.account.whole_records`.
    """
    account = Account()
    spans: list[tuple[int, int, int]] = []
    seen: set[str] = set()
    try:
        file, state = open_for_walk(job.source)
        with file:
            start = 0
            for key, members in groups(walk(job.source, file, state.st_size)):
                last = max(members.values(), key=lambda member: member.offset)
                end = last.offset + _padded(last.size)
                if key in seen:
                    account.lose(f"{job.label}#{key}", "its key comes twice")
                else:
                    seen.add(key)
                    account.read += 1
                    account.kept += 1
                    spans.append((start, end - start, sum(map(_size, members.values()))))
                start = end
    except DataError as error:
        account.lose(job.label, str(error))
    with atomic_file(job.target) as out:
        out.write(np.array(spans, dtype=SPAN).tobytes())
    return account


def read_span(shard: Path, file: int, start: int, length: int) -> Record:
    """Read the sample in ``length`` bytes at ``start`` of the tar open as descriptor ``file``; ``shard`` is for errors.

    Raises:
        DataError: the shard cannot be read, or it changed since it was scanned.
    """
    changed = DataError(f"shard {shard}: changed at byte {start} while it was read; start again with a new OUT")
    data = b"".join(_pieces(shard, file, start, length))
    if len(data) < length:
        raise changed
    stream = io.BytesIO(data + _END)
    try:
        found = list(groups(walk(shard, stream, length + len(_END))))
    except DataError as error:
        raise changed from error
    if len(found) != 1:
        raise changed
    key, members = found[0]
    return Record(key, {ext: data[member.offset : member.offset + member.size] for ext, member in members.items()})


def _pieces(shard: Path, file: int, start: int, length: int) -> Iterator[bytes]:
    while length:  # one call may return less than asked for
        try:
            piece = os.pread(file, length, start)
        except OSError as error:
            raise DataError(f"shard {shard}: cannot be read at byte {start} ({error.strerror})") from error
        if not piece:
            return
        yield piece
        start += len(piece)
        length -= len(piece)


def _size(member: Member) -> int:
    plain = len(member.name) <= _PLAIN_NAME and member.name.isascii()
    return (_PLAIN_HEADER if plain else _LONG_HEADER) + _padded(member.size)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
