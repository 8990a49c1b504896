"""Choose the columns of a table that hold picture and caption, and turn a row into an item."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.sources.item import FAILED_TO_DOWNLOAD, Item, Loss, read_caption
from megamoe.core.errors import DataError

# Tried in this order, in any case: LAION (URL, TEXT), COYO (image_url), open_clip (filepath, title), HF (file_name, text)
_URLS = ("url", "image_url")
_IMAGES = ("image", "image_path", "filepath", "file_name", "path")
_CAPTIONS = ("caption", "text", "title")


@dataclass(frozen=True)
class Names:
    """The names of a table's columns as given by the user; None: to be found."""

    url: str | None = None
    image: str | None = None
    caption: str | None = None
    image_root: Path | None = None
    captions: bool = True


@dataclass(frozen=True)
class Columns:
    """The chosen columns. Files are read from ``root`` and never from outside it."""

    picture: str
    online: bool
    caption: str | None
    captions: bool
    root: Path

    def __str__(self) -> str:
        caption = f"captions from column {self.caption!r}" if self.caption else "no captions"
        return f"{'URLs' if self.online else 'pictures'} from column {self.picture!r}, {caption}"


def choose_columns(found: Sequence[str], table: Path, names: Names) -> Columns:
    """Choose the columns of ``table``. A column of pictures wins over one of URLs, which is then metadata.

    Raises:
        DataError: a column that was named, or a required one, does not exist.
    """
    listed = ", ".join(found)
    for option, name in (("--url-col", names.url), ("--image-col", names.image), ("--caption-col", names.caption)):
        if name is not None and name not in found:
            raise DataError(f"{table}: has no column {name!r} ({option}); its columns: {listed}")
    if names.url is not None and names.image is not None:
        raise DataError(f"{table}: --url-col and --image-col exclude each other; give only the one that holds the pictures")
    image = names.image or (None if names.url else _find(found, _IMAGES))
    picture = image or names.url or _find(found, _URLS)
    if picture is None:
        raise DataError(f"{table}: no column of pictures or URLs; name it with --image-col or --url-col, of: {listed}")
    caption = names.caption or _find([name for name in found if name != picture], _CAPTIONS)
    if caption is None and names.captions:
        raise DataError(
            f"{table}: no column of captions; name it with --caption-col (of: {listed}), "
            "or give --captions-optional for pictures without"
        )
    return Columns(picture, image is None, caption, names.captions, names.image_root or table.parent)


def row_item(row: dict[str, Any], name: str, columns: Columns) -> Item:
    """Return the sample that ``row`` describes. Caption and URL are removed from its columns: they get columns of ours."""
    kept = {key: value for key, value in row.items() if key != columns.caption}
    value = kept.pop(columns.picture, None) if columns.online else kept.get(columns.picture)
    if isinstance(value, dict):  # as Hugging Face writes pictures into parquet
        kept[columns.picture] = value.get("path")
        value = value.get("bytes") or value.get("path")
    elif isinstance(value, bytes):
        del kept[columns.picture]
    caption, loss = read_caption(row.get(columns.caption) if columns.caption else None, columns.captions)
    if columns.online:
        url = value.strip() if isinstance(value, str) else ""
        if not url:
            return Item(name, "", caption, kept, loss=Loss(FAILED_TO_DOWNLOAD, "no URL"))
        return Item(name, url, caption, kept, loss=loss)
    if isinstance(value, bytes):
        return Item(name, value, caption, kept, loss=loss)
    try:
        return Item(name, _inside(columns.root, value), caption, kept, loss=loss)
    except Loss as outside:
        return Item(name, b"", caption, kept, loss=outside)


def _find(found: Sequence[str], wanted: Sequence[str]) -> str | None:
    lower: dict[str, str] = {}
    for name in found:
        lower.setdefault(name.lower(), name)
    return next((lower[name] for name in wanted if name in lower), None)


def _inside(root: Path, value: object) -> Path:
    """Return the path below ``root``. A table from elsewhere must not make us read other files of this machine."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise Loss(FAILED_TO_DOWNLOAD, "no path of a picture")
    if value.startswith(("http://", "https://")):
        raise Loss(FAILED_TO_DOWNLOAD, "a URL, not a path: use --url-col", f"{value}: a URL, not a path; use --url-col")
    base = os.path.abspath(root)
    path = os.path.normpath(os.path.join(base, value))
    if os.path.commonpath([base, path]) != base:
        cause = "outside of the folder of pictures"
        raise Loss(FAILED_TO_DOWNLOAD, cause, f"{value}: outside of {root}; name the folder with --image-root")
    return Path(path)
