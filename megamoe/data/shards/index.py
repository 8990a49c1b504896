"""Index a shard: record where each sample lies in the tar, in one pass, so that it can be read at random.

A sample is defined as in WebDataset: adjacent members whose names agree up to the first dot of the base name. It needs a
picture (``jpg``, ``jpeg``, ``png``, ``webp``; the first in the tar if there are several) and a caption (``txt``, else the
``"caption"`` of its ``json``). Samples that lack one, and repeated keys, are lost: the index counts and names them.

The file is NumPy's ``npz`` without pickles. It lies beside its shard as ``NAME.tar.idx``, or in a folder of indexes under
a name that distinguishes equal file names of different folders.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from megamoe.core.errors import DataError
from megamoe.core.files import atomic_file
from megamoe.core.urls import masked, unsigned
from megamoe.data.shards.expand import is_remote
from megamoe.data.shards.held_out import key_hashes
from megamoe.data.shards.mapped_npz import map_npz
from megamoe.data.shards.tar import Member, open_for_walk, walk

FORMAT = 4
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TEXT_EXTENSIONS = ("txt", "json")
_EXTENSIONS = IMAGE_EXTENSIONS + TEXT_EXTENSIONS  # an extension is stored as its index in this tuple
_NAME = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$", re.DOTALL)  # key and extension, as webdataset splits them
_META = re.compile(r"__[^/]*__($|/)")  # names that webdataset reserves for metadata


class ShardState(NamedTuple):
    """A shard on this machine: its file, and what distinguishes it from an earlier one of the same name.

    ``identity`` comes from the server of a fetched shard (its ETag). It is empty for a local file, which is identified by
    its modification time.
    """

    path: Path
    bytes: int
    mtime_ns: int
    identity: str

    @classmethod
    def of_file(cls, path: Path) -> ShardState:
        """Return the state of a local file.

        Raises:
            DataError: the file is missing or not accessible.
        """
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"shard {path}: cannot be read ({error.strerror}); check the path") from error
        return cls(path, status.st_size, status.st_mtime_ns, "")


class Extent(NamedTuple):
    """The contents of a member: offset and size in bytes, and the CRC-32 of its tar header."""

    offset: int
    size: int
    header: int


class SampleEntry(NamedTuple):
    """Where one sample lies in the tar: its picture and its caption, and their extensions."""

    key: str
    image: Extent
    image_ext: str
    text: Extent
    text_ext: str


@dataclass(frozen=True)
class IndexHeader:
    """Facts of a shard that can be read without its offsets."""

    format: int
    shard: str
    bytes: int
    mtime_ns: int
    identity: str
    samples: int
    incomplete: int
    duplicates: int


@dataclass(frozen=True)
class ShardIndex:
    """Offsets of all samples of one shard.

    ``table`` is int64 (samples, 8): extent and number of the extension of the picture, the same of the caption.
    ``others`` is int64 (n, 4): extent and number in ``extensions`` of the members that are neither; those of sample i end
    at ``other_ends[i]``. ``hashes`` is uint64 (samples,), :func:`.key_hash` of the keys. They are stored because each
    worker of a run opens each shard and in a large run reads few of its samples: hashing all keys, to find the held-out
    samples, would take longer than decoding those few.
    """

    header: IndexHeader
    table: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint8]
    key_ends: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint64]
    others: npt.NDArray[np.int64]
    other_ends: npt.NDArray[np.int64]
    extensions: list[str]
    incomplete: list[tuple[str, str]] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Number of complete samples."""
        return self.header.samples

    def key(self, i: int) -> str:
        """Return the key of sample ``i``."""
        start = int(self.key_ends[i - 1]) if i else 0
        return self.keys[start : int(self.key_ends[i])].tobytes().decode("utf-8")

    def sample(self, i: int) -> SampleEntry:
        """Return the entry of sample ``i`` in the order of the tar."""
        a, b, c, image_ext, d, e, f, text_ext = self.table[i].tolist()
        return SampleEntry(self.key(i), Extent(a, b, c), _EXTENSIONS[image_ext], Extent(d, e, f), _EXTENSIONS[text_ext])

    def members(self, i: int) -> dict[str, Extent]:
        """Return all members of sample ``i`` by extension, in the order of the tar."""
        entry = self.sample(i)
        found = [(entry.image, entry.image_ext), (entry.text, entry.text_ext)]
        for *extent, ext in self.others[self.other_ends[i - 1] if i else 0 : self.other_ends[i]].tolist():
            found.append((Extent(*extent), self.extensions[ext]))
        return {ext: extent for extent, ext in sorted(found)}


def build_index(shard: str | Path, state: ShardState | None = None) -> ShardIndex:
    """Build an index from the headers of ``shard``, read once, front to back.

    Args:
        shard: name of the shard.
        state: where it lies on this machine; default the local file of that name.

    Raises:
        DataError: it cannot be opened, is not an intact tar, has no complete sample, or changes while it is read.
    """
    rows: list[tuple[int, ...]] = []
    keys: list[str] = []
    others: list[tuple[int, ...]] = []
    other_ends: list[int] = []
    extensions: dict[str, int] = {}
    incomplete: list[tuple[str, str]] = []
    duplicates: list[str] = []
    seen: set[str] = set()
    path, name = state.path if state else Path(shard), masked(str(shard))
    file, before = open_for_walk(path)
    with file:
        for key, members in groups(walk(name, file, before.st_size)):
            if key in seen:
                duplicates.append(key)
                continue
            seen.add(key)
            image = next((ext for ext in members if ext in IMAGE_EXTENSIONS), None)
            text = next((ext for ext in TEXT_EXTENSIONS if ext in members), None)
            if text == "json" and not _has_caption(file, members["json"]):
                text = None
            if image is None or text is None:
                missing = [what for what, ext in (("picture", image), ("caption", text)) if ext is None]
                incomplete.append((key, f"no {' and no '.join(missing)}"))
                continue
            rows.append((*members[image][1:], _EXTENSIONS.index(image), *members[text][1:], _EXTENSIONS.index(text)))
            keys.append(key)
            for ext, member in members.items():
                if ext not in (image, text):
                    others.append((*member[1:], extensions.setdefault(ext, len(extensions))))
            other_ends.append(len(others))
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"shard {name}: changed while it was read; wait until it is written")
    if not rows:
        why = f"its first group {incomplete[0][0]!r} has {incomplete[0][1]}" if incomplete else "the tar is empty"
        raise DataError(f"shard {name}: no samples ({why}); a sample is KEY.jpg with KEY.txt, one after the other")
    identity = state.identity if state else ""
    mtime_ns = 0 if identity else before.st_mtime_ns
    header = IndexHeader(
        FORMAT, Path(shard).name, before.st_size, mtime_ns, identity, len(rows), len(incomplete), len(duplicates)
    )
    encoded = [key.encode("utf-8") for key in keys]
    return ShardIndex(
        header,
        np.asarray(rows, dtype=np.int64),
        np.frombuffer(b"".join(encoded), dtype=np.uint8),
        np.cumsum([len(key) for key in encoded], dtype=np.int64),
        key_hashes(keys),
        np.asarray(others, dtype=np.int64).reshape(-1, 4),
        np.asarray(other_ends, dtype=np.int64),
        list(extensions),
        incomplete,
        duplicates,
    )


def write_index(index: ShardIndex, path: Path) -> None:
    """Write ``index`` atomically: ``path`` is complete or absent."""
    names = {"extensions": index.extensions, "incomplete": index.incomplete, "duplicates": index.duplicates}
    with atomic_file(path) as file:
        np.savez(
            file,
            allow_pickle=False,
            header=_json_array(asdict(index.header)),
            table=index.table,
            keys=index.keys,
            key_ends=index.key_ends,
            hashes=index.hashes,
            others=index.others,
            other_ends=index.other_ends,
            names=_json_array(names),
        )


def index_path(shard: str | Path, index_dir: Path | None) -> Path:
    """Return where the index of ``shard`` is or would be: beside the shard if there is one, else in ``index_dir``.

    Without ``index_dir`` it is always the path beside the shard. A shard that is not a local file has no index beside it.
    """
    name = unsigned(os.fspath(shard))
    remote = is_remote(name)
    if not remote:
        path = Path(name)
        beside = path.with_name(f"{path.name}.idx")
        if index_dir is None or beside.exists():
            return beside
        name = os.path.realpath(path)
    assert index_dir is not None, "indexes of remote shards lie in the cache or in data.index"
    where = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    stem = "shard" if remote else Path(name).stem
    return index_dir / f"{stem}-{where}.tar.idx"


def load_index(shard: str | Path, index_dir: Path | None, state: ShardState | None = None) -> ShardIndex:
    """Load the index of ``shard`` and check that it is current.

    Args:
        shard: name of the shard.
        index_dir: see :func:`index_path`.
        state: where the shard lies now; default the local file of that name.

    Raises:
        DataError: the shard or its index is missing, or the index is unreadable or older than its shard.
    """
    index = read_index(shard, index_dir)
    header, now = index.header, state or ShardState.of_file(Path(shard))
    if now.bytes != header.bytes or now.mtime_ns > header.mtime_ns or now.identity != header.identity:
        raise DataError(
            f"index {index_path(shard, index_dir)} is older than its shard {masked(str(shard))}: {_remedy(shard)}"
        )
    return index


def read_index(shard: str | Path, index_dir: Path | None) -> ShardIndex:
    """Read the index of ``shard`` without checking the shard, which may have changed since.

    Raises:
        DataError: the index is missing, damaged or of another format.
    """
    path = index_path(shard, index_dir)
    damaged = f"index {path}: damaged; {_remedy(shard)}"
    try:
        arrays = map_npz(path)
        content = json.loads(arrays["header"].tobytes())
        if content["format"] != FORMAT:
            raise DataError(f"index {path}: format {content['format']}, not {FORMAT}; {_remedy(shard)}")
        names = json.loads(arrays["names"].tobytes())
        index = ShardIndex(
            IndexHeader(**content),
            arrays["table"],
            arrays["keys"],
            arrays["key_ends"],
            arrays["hashes"],
            arrays["others"],
            arrays["other_ends"],
            names["extensions"],
            [(key, why) for key, why in names["incomplete"]],
            names["duplicates"],
        )
    except FileNotFoundError as error:
        raise DataError(f"shard {masked(str(shard))}: has no index; {_remedy(shard)}") from error
    except (OSError, ValueError, KeyError, TypeError, EOFError, struct.error, zipfile.BadZipFile) as error:
        raise DataError(damaged) from error
    lengths = {len(each) for each in (index.key_ends, index.hashes, index.other_ends)}
    if index.table.shape != (index.samples, 8) or lengths != {index.samples}:
        raise DataError(damaged)
    return index


def learn_index(shard: str | Path, index_dir: Path | None, state: ShardState | None = None) -> ShardIndex:
    """Load the index of ``shard``, or build and write it if there is none. Concurrent processes build it once.

    Raises:
        DataError: the shard cannot be used, or an existing index is damaged or older than its shard.
    """
    path = index_path(shard, index_dir)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock")
        with FileLock(lock):
            if not path.exists():
                index = build_index(shard, state)
                write_index(index, path)
                lock.unlink(missing_ok=True)
                return index
    return load_index(shard, index_dir, state)


def groups(members: Iterator[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Group adjacent members with one key. A repeated extension begins a new group, so nothing is overwritten."""
    current: str | None = None
    group: dict[str, Member] = {}
    for member in members:
        match = _NAME.match(member.name)
        if match is None or _META.match(member.name):
            continue
        key, ext = match.group(1), match.group(2).lower()
        if key != current or ext in group:
            if current is not None:
                yield current, group
            current, group = key, {}
        group[ext] = member
    if current is not None:
        yield current, group


def _remedy(shard: str | Path) -> str:
    if is_remote(str(shard)):
        return "restore the shard that it was made from, or remove it and start a new run"
    return f"run `megamoe data index {shard}`"


def _has_caption(file: BinaryIO, member: Member) -> bool:
    here = file.tell()
    file.seek(member.offset)
    try:
        content = json.loads(file.read(member.size))
    except (ValueError, RecursionError):  # JSON from elsewhere may be nested a thousand deep
        return False
    finally:
        file.seek(here)
    return isinstance(content, dict) and isinstance(content.get("caption"), str)


def _json_array(content: object) -> npt.NDArray[np.uint8]:
    return np.frombuffer(json.dumps(content).encode("utf-8"), dtype=np.uint8)
