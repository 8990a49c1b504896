"""Locate the members of a tar: read its headers only, check each one, and detect a truncated file.

Python's ``tarfile``, and so ``webdataset``, silently stops where a tar was cut between members; here that is an error.
Formats: v7, ustar, GNU long names, pax (POSIX.1-2001), as ``tar``, Python and ``webdataset`` write them.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megamoe.core.errors import DataError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_NO_RECORDS: dict[str, str] = {}
_BUFFER = 1 << 20
_MAX_EXTENDED = 1 << 20  # a long name or pax record of more than this is damage, not a name
_HAS_NO_DATA = frozenset(b"123456")  # links, devices, folders, fifos: their size field is meaningless


class Member(NamedTuple):
    """A regular file in a tar: its name, the offset of its first byte in the tar, its size in bytes.

    ``header`` is the CRC-32 of the 512 bytes in front of it; a later reader can check that they are unchanged.
    """

    name: str
    offset: int
    size: int
    header: int


def walk(shard: str | Path, file: BinaryIO, length: int) -> Iterator[Member]:
    """Yield the regular files of the tar open as ``file`` (``length`` bytes; ``shard`` names it in errors), in order.

    Raises:
        DataError: not a tar, a damaged header, a truncated file, data after the end, or a sparse file.
    """
    path, at = str(shard), 0
    inherited: dict[str, str] = {}  # pax records for all members that follow
    own: dict[str, str] = {}  # names and sizes for the next member only
    while True:
        header = _read(file, path, at, BLOCK, length)
        if header == _ZEROS:
            _check_end(file, path, at + BLOCK, length)
            return
        if not checksum_is_right(header):
            raise DataError(_bad_header(path, at, header))
        kind = header[156]
        data = at + BLOCK
        attributes = inherited | own if inherited or own else _NO_RECORDS
        size = _size(header, attributes, path, at)
        if kind in b"xgLK":
            if size > _MAX_EXTENDED:
                raise DataError(f"shard {path}: damaged header at byte {at} (a name of {size} bytes); write it again")
            payload = _read(file, path, data, size, length)
            if kind == ord("L"):
                own["path"] = _text(payload)
            elif kind == ord("x"):
                own |= _pax(payload, path, at)
            elif kind == ord("g"):
                inherited |= _pax(payload, path, at)
            at = data + _padded(size)
            continue
        if kind == ord("S") or (attributes and any(record.startswith("GNU.sparse") for record in attributes)):
            raise DataError(f"shard {path}: sparse file at byte {at}; write the shard again without --sparse")
        own = {}
        if kind in _HAS_NO_DATA:
            at = data
            continue
        at = data + _padded(size)
        if at > length:
            raise DataError(_cut(path, length))
        name = attributes.get("path") or _name(header)
        if not name.endswith("/"):  # v7 marks folders that way
            yield Member(name, data, size, zlib.crc32(header))


def checksum_is_right(header: bytes) -> bool:
    """Return whether a 512-byte header matches its checksum (summed unsigned, or signed as in some old tars)."""
    try:
        recorded = _number(header[148:156])
    except ValueError:
        return False
    rest = header[:148] + header[156:]
    unsigned = _byte_sum(rest) + 8 * 32
    return recorded == unsigned or recorded == unsigned - 256 * sum(byte > 127 for byte in rest)


def header_size(header: bytes) -> int:
    """Return the size field of a member's own header, in bytes.

    Raises:
        ValueError: the field is not a number.
    """
    return _number(header[124:136])


def _byte_sum(data: bytes) -> int:
    """Return the sum of at most 512 bytes."""
    if data.count(0) < BLOCK // 2:
        return sum(data)
    # The low half of Adler-32 is 1 + the sum modulo 65521. If half of a header is zeros, as in most, the sum is at most
    # 256 * 255 and so below the modulus. This is ten times as fast.
    return (zlib.adler32(data) & 0xFFFF) - 1


def _read(file: BinaryIO, path: str, at: int, size: int, length: int) -> bytes:
    file.seek(at)
    data = file.read(size)
    if len(data) < size:
        raise DataError(_cut(path, at + len(data)))
    return data


def _check_end(file: BinaryIO, path: str, at: int, length: int) -> None:
    """Check that a second zero block follows the first one, and then nothing but padding."""
    if _read(file, path, at, BLOCK, length) != _ZEROS:
        raise DataError(f"shard {path}: damaged at byte {at} (one zero block instead of two); write it again")
    at += BLOCK
    while chunk := file.read(_BUFFER):
        if chunk.count(0) != len(chunk):
            raise DataError(
                f"shard {path}: more data after its end at byte {at} (two tars joined?), which readers skip; "
                "write it as one tar"
            )
        at += len(chunk)


def _cut(path: str, at: int) -> str:
    return f"shard {path}: truncated at byte {at}; copy or write it again"


def _bad_header(path: str, at: int, header: bytes) -> str:
    if at:
        return f"shard {path}: damaged header at byte {at} (wrong checksum); copy or write it again"
    if header[:2] == b"\x1f\x8b" or header[:4] in (b"\x28\xb5\x2f\xfd", b"\xfd7zX") or header[:3] == b"BZh":
        return f"shard {path}: a compressed tar does not allow random access; decompress it"
    return f"shard {path}: not a tar file; check the path"


def _size(header: bytes, attributes: dict[str, str], path: str, at: int) -> int:
    try:
        size = int(attributes["size"]) if "size" in attributes and header[156] not in b"xgLK" else header_size(header)
    except ValueError:
        size = -1
    if size < 0:
        raise DataError(f"shard {path}: damaged header at byte {at} (its size is no number); copy or write it again")
    return size


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU base-256, for what does not fit in octal digits
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if not digits:
        return 0
    if digits.translate(None, b"01234567"):
        raise ValueError("not an octal number")
    return int(digits, 8)


def _name(header: bytes) -> str:
    name = _text(header[:100])
    if header[345] and header[257:263] == b"ustar\0":
        return f"{_text(header[345:500])}/{name}"
    return name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _pax(payload: bytes, path: str, at: int) -> dict[str, str]:
    """Parse records of the form ``LENGTH KEY=VALUE\\n``, where LENGTH counts the whole record."""
    records: dict[str, str] = {}
    start = 0
    while start < len(payload) and payload[start]:
        space = payload.find(b" ", start, start + 20)
        digits = payload[start:space] if space > 0 else b""
        end = start + int(digits) if digits.isdigit() else -1
        if end <= space or end > len(payload) or payload[end - 1] != ord("\n"):
            raise DataError(f"shard {path}: damaged pax header at byte {at}; copy or write it again")
        key, _, value = payload[space + 1 : end - 1].partition(b"=")
        records[key.decode("utf-8", "backslashreplace")] = value.decode("utf-8", "backslashreplace")
        start = end
    return records


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def open_for_walk(path: Path) -> tuple[BinaryIO, os.stat_result]:
    """Open a tar for :func:`walk`, buffered so that small members take one read. Also return its state when opened.

    Raises:
        DataError: the file cannot be opened.
    """
    try:
        file = open(path, "rb", buffering=_BUFFER)  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise DataError(f"shard {path}: cannot be opened ({error.strerror}); check the path and its rights") from error
    return file, os.fstat(file.fileno())
