"""From the way users of WebDataset name shards to a list of local tar files."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from braceexpand import braceexpand

from megamoe.errors import DataError

_REMOTE = re.compile(r"^(pipe:|[A-Za-z][A-Za-z0-9+.-]*://)")
_PATTERN = re.compile(r"[*?\[]")


def expand_shards(specs: Sequence[str]) -> list[Path]:
    """List the tar files that ``specs`` name, in the order given.

    A spec is a tar file, ``path/{00000..00063}.tar``, a folder (its ``*.tar`` sorted by name, not those in folders
    below), a glob (sorted, ``**`` allowed), or several of these joined by ``::``.

    Raises:
        DataError: a spec names nothing, a shard is missing or named twice, or it is not a local file.
    """
    shards = [shard for spec in specs for part in spec.split("::") for shard in _expand(part, spec)]
    if not shards:
        raise DataError("no shards are named: give a folder, a glob or path/{00000..00063}.tar")
    seen: set[str] = set()
    for shard in shards:
        real = os.path.realpath(shard)
        if real in seen:
            raise DataError(f"shard {shard}: named twice; its samples would be seen twice per epoch, name it once")
        seen.add(real)
    return shards


def shard_labels(shards: Sequence[Path]) -> list[str]:
    """The shards' names in sample ids (``<label>#<key>``).

    That is the file name without its folder, so that ids survive a move of the data; shards whose file names are equal
    are named by their whole path, so that ids stay unique.
    """
    names = Counter(shard.name for shard in shards)
    return [shard.name if names[shard.name] == 1 else str(shard) for shard in shards]


def _expand(part: str, spec: str) -> Iterator[Path]:
    if not part:
        raise DataError(f"shards {spec!r}: there is an empty name in it; write a.tar or a.tar::b.tar")
    if match := _REMOTE.match(part):
        kind = match.group(0)
        raise DataError(f"shards {part!r}: {kind} cannot be read in this version; copy the shards to a local folder")
    if os.path.lexists(os.path.expanduser(part)):  # a real name wins over a reading as a pattern
        yield from _local(part)
        return
    try:
        names = list(braceexpand(part))
    except ValueError as error:  # its UnbalancedBracesError
        raise DataError(f"shards {part!r}: unbalanced braces; write path/{{00000..00063}}.tar") from error
    for name in names:
        yield from _local(name)


def _local(name: str) -> list[Path]:
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix == ".tar" and not p.name.startswith(".") and p.is_file())
        if not found:
            raise DataError(f"shards {name!r}: the folder holds no .tar file; name the folder that does")
        return found
    if path.is_file():
        return [path]
    if _PATTERN.search(name):
        # indexes lie beside their shards, and patterns such as train-* match them too
        matches = (Path(match) for match in glob.glob(str(path), recursive=True))
        found = sorted(match for match in matches if match.suffix != ".idx" and match.is_file())
        if not found:
            raise DataError(f"shards {name!r}: no file matches; check the folder and the pattern")
        return found
    raise DataError(f"shard {name}: no such file; check the path")
