"""Read a folder of pictures, each with its caption in a ``.txt`` or ``.json`` file of the same stem beside it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.sources.item import FAILED_TO_DOWNLOAD, NO_CAPTION, Chunk, Item, Loss, Source, read_caption
from megamoe.core.errors import DataError
from megamoe.data.sample.decode import CorruptSample, decode_caption
from megamoe.data.shards.index import IMAGE_EXTENSIONS

_UNSAFE = re.compile(r"[^\w/-]")
_MAX_SIDECAR = 16 << 20  # bytes; a larger file is no caption


@dataclass(frozen=True)
class FolderChunk:
    """Pictures of one shard: their paths below ``root`` (with ``/``) and their keys."""

    root: Path
    files: tuple[tuple[str, str], ...]
    captions: bool

    @property
    def samples(self) -> int:
        """Number of pictures."""
        return len(self.files)

    def items(self) -> Iterator[Item]:
        """Read captions and metadata; the caller reads the pictures."""
        for name, key in self.files:
            yield _item(self.root, name, key, self.captions)


def open_folder(root: Path, shard_size: int, *, captions: bool) -> Source:
    """List the pictures of ``root`` and its subfolders, sorted by path; hidden files and folders are skipped.

    Raises:
        DataError: it holds no picture.
    """
    digest = hashlib.sha256()
    names: list[str] = []
    for name in sorted(_walk(root)):
        picture = name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
        if picture:
            names.append(name)
        if picture or name.endswith((".txt", ".json")):
            state = (root / name).stat()
            digest.update(f"{name!r} {state.st_size} {state.st_mtime_ns}\n".encode())
    if not names:
        kinds = ", ".join(IMAGE_EXTENSIONS)
        raise DataError(f"{root}: holds neither pictures ({kinds}) nor tables; name the folder or file that does")
    files = list(zip(names, _keys(names), strict=True))
    chunks: list[Chunk] = [
        FolderChunk(root, tuple(files[at : at + shard_size]), captions) for at in range(0, len(files), shard_size)
    ]
    return Source("folder", chunks, digest.hexdigest(), False, "pictures with .txt and .json files beside them")


def _walk(root: Path) -> Iterator[str]:
    for folder, below, files in os.walk(root, onerror=_refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        prefix = Path(folder).relative_to(root).as_posix()
        for name in files:
            path = name if prefix == "." else f"{prefix}/{name}"
            if not name.startswith(".") and os.path.isfile(os.path.join(root, path)):  # no pipes, no devices
                yield path


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); check its rights") from error


def _keys(names: list[str]) -> Iterator[str]:
    """Yield a key per picture: its path without the extension.

    A dot would end the key early, and webdataset would then mix ``a.1.jpg`` with ``a.2.jpg``. Characters other than
    letters, digits, ``_`` and ``-`` cause trouble in shells or file systems. Both become ``_``. A key that was changed so,
    or that another picture has already, gets a part of the hash of the path, so that all keys differ.
    """
    seen: set[str] = set()
    for name in names:
        stem = name.rpartition(".")[0]
        key = _UNSAFE.sub("_", stem)
        if key.startswith("__"):  # webdataset skips such names
            key = f"x{key}"
        if key != stem or key in seen:
            digest = hashlib.sha256(os.fsencode(name)).hexdigest()
            key = next(each for size in range(8, 65) if (each := f"{key}-{digest[:size]}") not in seen)
        seen.add(key)
        yield key


def _item(root: Path, name: str, key: str, captions: bool) -> Item:
    shown = os.fsencode(name).decode("utf-8", "replace")
    columns: dict[str, Any] = {"path": shown}
    stem = root / name.rpartition(".")[0]
    try:
        metadata = _sidecar(Path(f"{stem}.json"))
        content = json.loads(metadata) if metadata is not None else {}
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except OSError as error:
        return Item(shown, columns=columns, key=key, loss=_unreadable("json", error.strerror))
    except (ValueError, RecursionError) as error:
        return Item(shown, columns=columns, key=key, loss=_unreadable("json", str(error)))
    columns |= {name: value for name, value in content.items() if name != "caption"}
    try:
        text = _sidecar(Path(f"{stem}.txt"))
        caption = content.get("caption") if text is None else decode_caption(text, "txt")
    except CorruptSample as error:
        if not captions and str(error) == "caption: empty":
            return Item(shown, root / name, None, columns, key)
        return Item(shown, columns=columns, key=key, loss=Loss(NO_CAPTION, str(error)))
    except (OSError, ValueError) as error:
        return Item(shown, columns=columns, key=key, loss=Loss(NO_CAPTION, "caption: cannot be read", str(error)))
    caption, loss = read_caption(caption, captions)
    return Item(shown, root / name, caption, columns, key, loss)


def _unreadable(what: str, why: str | None) -> Loss:
    return Loss(FAILED_TO_DOWNLOAD, f"{what}: cannot be read", f"{what}: cannot be read ({why})")


def _sidecar(path: Path) -> bytes | None:
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        content = file.read(_MAX_SIDECAR + 1)
    if len(content) > _MAX_SIDECAR:
        raise ValueError(f"more than {_MAX_SIDECAR} bytes")
    return content
