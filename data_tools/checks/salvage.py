"""Find what can still be read of a damaged tar: stretches of intact members, and the byte ranges between them.

A stretch is read by the same strict walk as an intact shard. Where the walk stops, the next header is searched for: on
whole blocks, or at any byte that begins a header with the ``ustar`` magic (bytes lost in a copy shift all that follow).
A header counts only if its checksum is right. Nothing is guessed about the bytes in between.

Two members next to damage are not trusted, because their name or their bytes may belong to others:

* the first one after it, if its name may stand for a longer one in an extended header that was lost;
* the last one before it, if zeros do not fill up its last block, as they do in an intact member. It counts as bytes passed
  over, and is searched for headers that it may have swallowed.
"""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from megamoe.core.errors import DataError
from megamoe.data.shards.tar import BLOCK, Member, checksum_is_right, walk

_CHUNK = 1 << 20
_RECORD = 20 * BLOCK  # writers fill a tar with zeros to a multiple of this
_MAGIC, _MAGIC_AT = b"ustar", 257
_CHECKSUM = re.compile(rb"(?=.*[0-7])[0-7 \0]{8}", re.DOTALL)
_KINDS = frozenset(b"\x0001234567xgLKS")
_EXTENDED = frozenset(b"xgLK")
_PAX_RECORD = re.compile(rb"\d+ [A-Za-z][\w.]*=")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp")


class Gap(NamedTuple):
    """Bytes ``start`` up to ``end`` that were passed over; the name of the member there, if its header is intact."""

    start: int
    end: int
    reason: str
    name: str | None


@dataclass
class Stretch:
    """Members with only intact headers from the first to the last. ``damaged_before``: the stretch follows damage."""

    start: int
    damaged_before: bool
    members: list[Member] = field(default_factory=list)


@dataclass
class Salvage:
    """Everything that was found. ``parts``: tars joined in the file; ``ended``: the last one has its end blocks."""

    stretches: list[Stretch] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    distrusted: list[Member] = field(default_factory=list)  # right after damage; no longer in their stretches
    parts: int = 1
    ended: bool = True

    @property
    def whole(self) -> bool:
        """Whether the file is one tar without damage."""
        return self.ended and self.parts == 1 and not self.gaps


def salvage(path: Path, file: BinaryIO, length: int) -> Salvage:
    """Find the members of the file open as ``file`` (``length`` bytes), front to back. Only offsets are kept in memory."""
    found = Salvage()
    at = part = 0
    damaged = False
    while True:
        stretch = Stretch(at, damaged)
        view = _View(file, at)
        finished, end = True, at
        try:
            # The padding of the last member may be cut off: it is not part of its bytes.
            for member in walk(path, cast(BinaryIO, view), _padded(length - at)):
                member = member._replace(offset=member.offset + at)
                if member.offset + member.size > length:
                    finished = False
                    break
                stretch.members.append(member)
                end = _padded_end(member)
        except DataError:
            finished = False
        found.stretches.append(stretch)
        if finished:
            break
        failed = at + view.last
        search = failed if failed > at else at + BLOCK
        if stretch.members and _is_doubtful(file, stretch.members[-1]):
            # Bytes are missing, so what the member seems to hold may contain the next headers.
            search = stretch.members.pop().offset
            end = _padded_end(stretch.members[-1]) if stretch.members else at
        after = _next_header(file, search, length)
        zeros = _all_zero(file, end, after)
        if zeros and after >= length and any(each.members for each in found.stretches):
            found.ended = False
            break
        if zeros and _ends_a_tar(after - end, after - part):
            found.parts += 1
            part, damaged = after, False
        elif after > end:
            damaged = True
            reason = _reason(file, failed, zeros, after >= length)
            _add_gap(found.gaps, Gap(end, after, reason, _name(file, end)))
        at = after
        if at >= length:
            break
    found.stretches = [stretch for stretch in found.stretches if stretch.members]
    _distrust(found, file)
    return found


class _View:
    """A view of a file from ``base`` on; ``last`` is the offset of the last seek."""

    def __init__(self, file: BinaryIO, base: int) -> None:
        self._file = file
        self._base = base
        self.last = 0

    def seek(self, offset: int) -> int:
        self.last = offset
        return self._file.seek(self._base + offset)

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)


def _next_header(file: BinaryIO, start: int, length: int) -> int:
    """Return where the first header from ``start`` on begins, or ``length``."""
    for at in range(start, length, _CHUNK):
        file.seek(at)
        chunk = file.read(_CHUNK + BLOCK - 1)
        best = len(chunk)
        magic = chunk.find(_MAGIC, _MAGIC_AT)
        while magic >= 0:
            if _is_header(chunk[magic - _MAGIC_AT : magic - _MAGIC_AT + BLOCK]):
                best = magic - _MAGIC_AT
                break
            magic = chunk.find(_MAGIC, magic + 1)
        for block in range(0, min(best, _CHUNK), BLOCK):  # v7 headers have no magic
            if _is_header(chunk[block : block + BLOCK]):
                best = block
                break
        if best < len(chunk):
            return at + best
    return length


def _is_header(block: bytes) -> bool:
    return (
        len(block) == BLOCK
        and _CHECKSUM.match(block[148:156]) is not None
        and block[0] != 0
        and block[156] in _KINDS
        and checksum_is_right(block)
    )


def _ends_a_tar(zeros: int, length: int) -> bool:
    """Return whether so many zeros end a tar of ``length`` bytes, zeros included. A hole in a file has another size."""
    return zeros == 2 * BLOCK or (zeros > 2 * BLOCK and length % _RECORD == 0)


def _add_gap(gaps: list[Gap], gap: Gap) -> None:
    if gaps and gaps[-1].end == gap.start:
        gap = gaps.pop()._replace(end=gap.end)
    gaps.append(gap)


def _reason(file: BinaryIO, failed: int, zeros: bool, at_end: bool) -> str:
    block = _block(file, failed)
    if at_end and (len(block) < BLOCK or _is_header(block)):
        return "cut: the file ends here"
    if zeros or not block.strip(b"\0"):
        return "zeros where a header should be"
    return "header that cannot be used" if _is_header(block) else "damaged header"


def _is_doubtful(file: BinaryIO, member: Member) -> bool:
    """Return whether the last member before damage may hold bytes of others.

    Its last block should be filled up with zeros. If it is full, a picture is trusted, since decoding will check it, unless
    there is a header in it.
    """
    following = _block(file, _padded_end(member))
    if len(following) < BLOCK or following.count(0) == BLOCK or _is_header(following):
        return False
    file.seek(member.offset + member.size)
    filling = file.read(-member.size % BLOCK)
    if filling or not member.name.lower().endswith(_PICTURES):
        return not filling or filling.count(0) != len(filling)
    return _next_header(file, member.offset, member.offset + member.size) < member.offset + member.size


def _distrust(found: Salvage, file: BinaryIO) -> None:
    """Remove the first members after damage whose names may stand for others."""
    extended = _has_extended_headers(found, file)
    before = {gap.end: gap for gap in found.gaps}
    for stretch in found.stretches:
        first = stretch.members[0]
        if stretch.damaged_before and first.offset - BLOCK == stretch.start:
            name = _block(file, stretch.start)[:100]
            gap = before.get(stretch.start)
            lost_name = gap is not None and _PAX_RECORD.match(_block(file, gap.start + BLOCK))
            if extended or lost_name or 0 not in name or b"?" in name:
                found.distrusted.append(stretch.members.pop(0))
    found.stretches = [stretch for stretch in found.stretches if stretch.members]


def _has_extended_headers(found: Salvage, file: BinaryIO) -> bool:
    """Return whether a header in this tar gives, or gave, the name of a member in place of the member's own."""
    for stretch in found.stretches:
        for member, following in zip(stretch.members, stretch.members[1:], strict=False):
            if following.offset - BLOCK != _padded_end(member):
                return True
    starts = [stretch.start for stretch in found.stretches] + [gap.start for gap in found.gaps]
    return any(_is_header(block) and block[156] in _EXTENDED for block in (_block(file, start) for start in starts))


def _all_zero(file: BinaryIO, start: int, end: int) -> bool:
    file.seek(start)
    while start < end:
        chunk = file.read(min(_CHUNK, end - start))
        if chunk.strip(b"\0"):
            return False
        if not chunk:
            break
        start += len(chunk)
    return True


def _block(file: BinaryIO, at: int) -> bytes:
    file.seek(at)
    return file.read(BLOCK)


def _name(file: BinaryIO, at: int) -> str | None:
    block = _block(file, at)
    if not _is_header(block) or block[156] not in b"\x000":
        return None
    return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace").name


def _padded_end(member: Member) -> int:
    return member.offset + _padded(member.size)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
