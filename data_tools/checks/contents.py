"""Check the bytes of a member, and define the names of what can be wrong with a sample."""

from __future__ import annotations

import json
from typing import BinaryIO

from megamoe.data.sample.decode import CorruptSample, decode_caption, decode_image
from megamoe.data.shards.index import IMAGE_EXTENSIONS, TEXT_EXTENSIONS
from megamoe.data.shards.tar import Member

NO_PICTURE, NO_CAPTION, DUPLICATE = "no picture", "no caption", "duplicate key"
PICTURE, CAPTION, JSON = "damaged picture", "damaged caption", "damaged json"
EXTENSION = "wrong extension"

MAX_MEMBER = 1 << 28  # bytes; a larger member is no picture or text, and would only fill the memory
CHECKED = IMAGE_EXTENSIONS + TEXT_EXTENSIONS
_SIDE = 32  # every byte is decoded at any size; a small size makes the resize cheap
_KINDS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WebP"}


def content_problem(ext: str, data: bytes, decode: bool) -> tuple[str, str] | None:
    """Return cause and detail of what is wrong with the bytes of one member; None if nothing is.

    Pictures (with ``decode`` every byte, else the first bytes), ``txt`` and ``json`` are checked; other members are not.
    """
    if ext in IMAGE_EXTENSIONS:
        kind = _kind(data)
        try:
            if decode or kind is None:
                decode_image(data, _SIDE)
        except CorruptSample as corrupt:
            return PICTURE, str(corrupt)
        return None if kind == _KINDS[ext] else (EXTENSION, f".{ext} holds a {kind}")
    if ext == "txt":
        try:
            decode_caption(data, ext)
        except CorruptSample as corrupt:
            return CAPTION, str(corrupt)
    if ext == "json":
        try:
            json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            return JSON, f"json: {error}"
    return None


def json_caption(data: bytes) -> tuple[bool, str]:
    """Return whether a ``json`` member has a caption, and what is wrong with the caption ("" if nothing is)."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return False, ""
    if not isinstance(content, dict) or not isinstance(content.get("caption"), str):
        return False, ""
    try:
        decode_caption(data, "json")
    except CorruptSample as corrupt:
        return True, str(corrupt)
    return True, ""


def read_member(file: BinaryIO, member: Member) -> bytes:
    """Read the bytes of ``member``.

    Raises:
        CorruptSample: it is larger than ``MAX_MEMBER``.
    """
    if member.size > MAX_MEMBER:
        raise CorruptSample(f"{member.size} bytes, more than {MAX_MEMBER}")
    file.seek(member.offset)
    return file.read(member.size)


def _kind(data: bytes) -> str | None:
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    return "WebP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None
