"""Define what every source yields: one sample that may become a record, or the reason why it cannot."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

FORMATS = ("folder", "csv", "tsv", "jsonl", "parquet", "txt")  # formats of sources
# The first three are img2dataset's names in its parquet and stats files; the last one is ours.
SUCCESS = "success"
FAILED_TO_DOWNLOAD = "failed_to_download"  # the picture's bytes could not be read, from the web or from the disk
FAILED_TO_RESIZE = "failed_to_resize"  # there are bytes, but not of a usable picture
NO_CAPTION = "no_caption"


class Loss(Exception):
    """The reason why a sample is lost. ``cause`` is one of few, for counting; the message is exact."""

    def __init__(self, status: str, cause: str, message: str | None = None) -> None:
        super().__init__(message or cause)
        self.status = status
        self.cause = cause


@dataclass(frozen=True)
class Item:
    """One sample of a source.

    Attributes:
        name: for people: a path, or a table and its row.
        key: its key in the shard; None: numbered, as img2dataset does.
        picture: a file, a URL (text), or the bytes themselves.
        caption: without surrounding white space; None: there is none, and none is required.
        columns: everything else that the source states about it.
        loss: why the sample is lost; None: it is not.
    """

    name: str
    picture: Path | str | bytes = b""
    caption: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    key: str | None = None
    loss: Loss | None = None


class Chunk(Protocol):
    """The samples of one shard. Small, since it is sent to another process."""

    @property
    def samples(self) -> int:
        """Number of items."""
        ...

    def items(self) -> Iterator[Item]:
        """Read the items, in order."""
        ...


@dataclass(frozen=True)
class Source:
    """A source, cut into shards.

    Attributes:
        kind: its format, as ``--input-format`` names it.
        chunks: one per shard.
        fingerprint: changes with the source's files, their sizes or times.
        online: whether pictures are downloaded.
        note: what was detected, for people.
    """

    kind: str
    chunks: list[Chunk]
    fingerprint: str
    online: bool
    note: str


def read_caption(caption: object, needed: bool) -> tuple[str | None, Loss | None]:
    """Return the caption to keep, or why the sample is lost; (None, None) if it has no caption and needs none."""
    if isinstance(caption, str) and caption.strip():
        try:
            caption.encode("utf-8")
        except UnicodeError:
            return None, Loss(NO_CAPTION, "caption: not UTF-8")
        return caption.strip(), None
    if caption is None or isinstance(caption, str):
        loss = Loss(NO_CAPTION, "caption: missing" if caption is None else "caption: empty")
        return None, loss if needed else None
    return None, Loss(NO_CAPTION, "caption: not text", f"caption: not text but {type(caption).__name__}")


def plain(value: Any) -> Any:
    """Convert ``value`` for JSON: no NaN, no half surrogates, dates as ISO 8601, bytes as base64."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
