"""Find the picture and the caption of a sample, by the rules of the training index."""

from __future__ import annotations

from data_tools.writing.records import Record
from megamoe.data.sample.decode import CorruptSample, decode_caption
from megamoe.data.shards.index import IMAGE_EXTENSIONS, TEXT_EXTENSIONS


def picture_of(record: Record) -> bytes | None:
    """Return the bytes of the picture, the first in the tar if there are several; None if there is none."""
    return next((content for ext, content in record.members.items() if ext in IMAGE_EXTENSIONS), None)


def caption_of(record: Record) -> str | None:
    """Return the caption without surrounding white space; None if there is none that can be read."""
    ext = next((ext for ext in TEXT_EXTENSIONS if ext in record.members), None)
    if ext is None:
        return None
    try:
        return decode_caption(record.members[ext], ext)
    except (CorruptSample, RecursionError):  # RecursionError: JSON made of a hundred thousand brackets
        return None
