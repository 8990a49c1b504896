"""Expand shard names as WebDataset users write them to a list of local tar files, URLs and commands."""

from __future__ import annotations

import glob
import itertools
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from megamoe.core.errors import DataError
from megamoe.core.urls import masked, scheme, unsigned
from megamoe.data.shards.names import repeated

_JOIN = re.compile(r"::(?![^\[]*\])")  # but not the one in an IPv6 address: http://[::1]/a.tar
_PATTERN = re.compile(r"[*?\[]")
_WEB = ("http", "https")
_FILE = "file://"
# With more names than this, each folder is listed once and names are not checked one by one: on a parallel file system
# one check takes up to a millisecond on every rank, and 217,000 of them take minutes.
_MANY = 1000


def expand_shards(specs: Sequence[str]) -> list[str]:
    """List the shards that ``specs`` name, in the order given.

    A spec is one of the following, or several joined by ``::``; braces (``{00000..00063}``, ``{a,b}``) work in all:

    - local: a tar file, a folder (its ``*.tar`` sorted by name, without subfolders) or a glob (sorted, ``**`` allowed);
      a ``file://`` in front is ignored;
    - ``http://`` and ``https://``: one tar file each, not checked before it is read, since a web server has no listing;
    - ``s3://``, ``gs://``, ``az://``, ``hf://`` and any other scheme of fsspec: a tar file (not checked before it is
      read), a folder (ends in ``/``) or a glob, listed through fsspec;
    - ``pipe:COMMAND``: the standard output of a shell command.

    Local names are checked: a missing one is an error here.

    Raises:
        DataError: a spec names nothing, a local shard is missing, or a shard is named twice.
    """
    return list(iter_shards(specs))


def iter_shards(specs: Sequence[str]) -> Iterator[str]:
    """Yield the shards of :func:`expand_shards` one by one: hundreds of thousands of names are never all in memory.

    Raises:
        DataError: as for :func:`expand_shards`; for a shard that is named twice, after the last one.
    """
    disk = _Disk(many=any(True for _ in itertools.islice(_expanded(specs), _MANY, None)))
    files = array("q")  # numbers in place of names: see megamoe.data.shards.names
    for shard, real in _found(specs, disk):
        files.append(hash(real))
        yield shard
    if not files:
        raise DataError("no shards are named: give a folder, a glob, path/{00000..00063}.tar or a URL")
    if twice := repeated(np.asarray(files)):
        seen: set[str] = set()
        for shard, real in _found(specs, disk):
            if real in seen:
                raise DataError(
                    f"shard {masked(shard)}: named twice; its samples would be seen twice per epoch, name it once"
                )
            if hash(real) in twice:
                seen.add(real)


def local_shards(specs: Sequence[str]) -> list[Path]:
    """Expand shards for tools that need local files; otherwise as :func:`expand_shards`.

    Raises:
        DataError: a shard is not a local file.
    """
    shards = expand_shards(specs)
    if remote := next((shard for shard in shards if is_remote(shard)), None):
        raise DataError(f"shard {masked(remote)}: is not a local file, which this command needs; copy it first")
    return [Path(shard) for shard in shards]


def is_remote(shard: str) -> bool:
    """Return whether ``shard``, as :func:`expand_shards` returns it, is not a local file."""
    return scheme(shard) is not None


def _expanded(specs: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each name and the part of a spec that it comes from."""
    return ((name, part) for spec in specs for part in _JOIN.split(spec) for name in _names(part, spec))


def _found(specs: Sequence[str], disk: _Disk) -> Iterator[tuple[str, str]]:
    """Yield each shard with an identity that is equal for two names of the same shard."""
    for name, part in _expanded(specs):
        kind = scheme(name)
        if kind is not None:
            for shard in _remote(kind, name, part):
                yield shard, unsigned(shard)
        else:
            yield from ((shard, disk.real(shard)) for shard in _local(name, disk))


def _names(part: str, spec: str) -> Iterator[str]:
    """Yield the names of ``part``: braces expanded, ``file://`` removed."""
    if not part:
        raise DataError(f"shards {masked(spec)!r}: a name in it is empty; write a.tar or a.tar::b.tar")
    part = part.removeprefix(_FILE)
    kind = scheme(part)
    if kind is None and os.path.lexists(os.path.expanduser(part)):
        yield part  # a file of exactly this name wins over a pattern
        return
    try:
        # Backslashes in a command are the shell's. Without any, braceexpand need not unescape each name.
        yield from braceexpand(part, escape=kind != "pipe" and "\\" in part)
    except ValueError as error:  # its UnbalancedBracesError
        raise DataError(f"shards {masked(part)!r}: unbalanced braces; write path/{{00000..00063}}.tar") from error


def _remote(kind: str, name: str, part: str) -> list[str]:
    if kind == "pipe":
        if not name.removeprefix("pipe:").strip():
            raise DataError(f"shards {part!r}: the command is missing; write pipe:COMMAND")
        return [name]
    if kind in _WEB:
        path = name.partition("?")[0]
        if path.endswith("/") or "*" in path:
            raise DataError(
                f"shards {masked(name)!r}: a web server cannot list its files; "
                f"write {kind}://host/path/{{00000..00063}}.tar"
            )
        return [name]
    if not (name.endswith("/") or _PATTERN.search(name)):
        return [name]
    from megamoe.data.remote.object_store import list_objects

    return list_objects(name)


def _local(name: str, disk: _Disk) -> list[str]:
    path = str(Path(os.path.expanduser(name)))
    if disk.is_folder(path):
        found = disk.tars(path)
        if not found:
            raise DataError(f"shards {name!r}: the folder holds no .tar file; name the folder that does")
        return found
    if disk.is_file(path):
        return [path]
    if _PATTERN.search(name):
        matches = glob.glob(path, recursive=True)
        disk.many |= len(matches) > _MANY
        # indexes lie beside their shards, and patterns such as train-* match them too
        found = sorted(match for match in matches if not match.endswith(".idx") and disk.is_file(match))
        if not found:
            raise DataError(f"shards {name!r}: no file matches; check the folder and the pattern")
        return found
    raise DataError(f"shard {name}: no such file; check the path")


class _Disk:
    """Check local names: one by one, or if there are ``many``, from one listing of each folder."""

    def __init__(self, many: bool) -> None:
        self.many = many
        self._listed: dict[str, dict[str, os.DirEntry[str]]] = {}
        self._real: dict[str, str] = {}

    def is_file(self, path: str) -> bool:
        if not self.many:
            return os.path.isfile(path)
        entry = self._entry(path)
        return entry is not None and entry.is_file()

    def is_folder(self, path: str) -> bool:
        if not self.many or os.path.basename(path) in ("", ".", ".."):
            return os.path.isdir(path)
        entry = self._entry(path)
        return entry is not None and entry.is_dir()

    def tars(self, folder: str) -> list[str]:
        """Return the visible ``*.tar`` files in ``folder``, sorted by name."""
        entries = self._list(folder)
        names = (name for name in entries if name.endswith(".tar") and not name.startswith("."))
        return [os.path.join(folder, name) for name in sorted(names) if entries[name].is_file()]

    def real(self, path: str) -> str:
        """Return ``path`` with all symbolic links resolved."""
        folder, name = os.path.split(path)
        entry = self._listed.get(folder, {}).get(name)
        if entry is None or entry.is_symlink():
            return os.path.realpath(path)
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        return os.path.join(self._real[folder], name)

    def _entry(self, path: str) -> os.DirEntry[str] | None:
        folder, name = os.path.split(path)
        return self._list(folder).get(name)

    def _list(self, folder: str) -> dict[str, os.DirEntry[str]]:
        if folder not in self._listed:
            try:
                with os.scandir(folder or ".") as entries:
                    self._listed[folder] = {entry.name: entry for entry in entries}
            except (FileNotFoundError, NotADirectoryError):
                self._listed[folder] = {}
            except OSError as error:
                raise DataError(f"folder {folder}: cannot be listed ({error.strerror}); check its rights") from error
        return self._listed[folder]
