"""Write and verify the SHA-256 of shards, in files that ``sha256sum -c`` of coreutils reads: `megamoe data checksum`.

Each folder of shards gets its own ``SHA256SUMS``, so that it can be moved with its shards.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.distribute.jobs import map_jobs
from megamoe.core.errors import DataError
from megamoe.core.files import atomic_file

SUMS = "SHA256SUMS"
_JOURNAL = f".{SUMS}.partial"  # finished work of a run, one JSON value per line
_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)", re.DOTALL)
_MAX_SUMS = 1 << 28  # bytes
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}


@dataclass
class Verdict:
    """The names of shards by result. ``not_asked`` counts listed, existing files that were not to be verified."""

    right: int = 0
    not_asked: int = 0
    differ: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    no_sum: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        """Whether any shard failed or could not be verified."""
        return bool(self.differ or self.missing or self.no_sum or self.unreadable)


@dataclass(frozen=True)
class Written:
    """The files of sums written, the number of shards in them (``resumed`` from an earlier run), and changed sums."""

    files: list[Path]
    shards: int
    resumed: int
    changed: list[str]


def sum_line(digest: str, name: str) -> str:
    """Return a line as ``sha256sum`` writes it. If a name has a backslash or a line break, it is escaped and marked."""
    escaped = "".join(_ESCAPES.get(letter, letter) for letter in name)
    mark = "\\" if escaped != name else ""
    return f"{mark}{digest}  {escaped}\n"


def shard_sums(shards: Sequence[Path], processes: int | None = None) -> Iterator[tuple[Path, str]]:
    """Yield each shard with its sum in hex, in order.

    Raises:
        DataError: a shard cannot be read.
    """
    for shard, digest in map_jobs(_digest, list(shards), label="sha256", processes=processes):
        if digest is None:
            raise DataError(f"shard {shard}: cannot be read; check the disk and its rights")
        yield shard, digest


def write_sums(shards: Sequence[Path], processes: int | None = None) -> Written:
    """Write SHA256SUMS into each folder of ``shards``, and keep its lines of other files.

    Sums of an interrupted earlier run are reused if size and time of their shards are unchanged.

    Raises:
        DataError: a shard cannot be read, a folder cannot be written, or an existing SHA256SUMS is not valid.
    """
    files: list[Path] = []
    changed: list[str] = []
    resumed = 0
    folders: dict[Path, list[Path]] = {}
    for shard in shards:
        folders.setdefault(shard.parent, []).append(shard)
    old = {folder: read_sums(folder) for folder in folders}  # a damaged file is reported before hours of work
    for folder, own in folders.items():
        known = _read_journal(folder)
        new = {shard.name: known[key] for shard in own if (key := _state(shard)) in known}
        resumed += len(new)
        try:
            with open(folder / _JOURNAL, "a", encoding="utf-8") as journal:
                journal.write("\n")  # the last line of an interrupted run may be incomplete
                for shard, digest in shard_sums([shard for shard in own if shard.name not in new], processes):
                    new[shard.name] = digest
                    journal.write(f"{json.dumps([*_state(shard), digest])}\n")
                    journal.flush()
        except OSError as error:
            raise DataError(
                f"{folder / _JOURNAL}: cannot be written ({error.strerror}); make the folder writable"
            ) from error
        before = old[folder]
        changed += [str(folder / name) for name in new if name in before and before[name] != new[name]]
        with atomic_file(folder / SUMS) as out:
            for name, digest in sorted((before | new).items()):
                out.write(sum_line(digest, name).encode("utf-8", "surrogateescape"))
        (folder / _JOURNAL).unlink(missing_ok=True)
        files.append(folder / SUMS)
    return Written(files, len(shards), resumed, changed)


def verify_sums(shards: Sequence[Path], processes: int | None = None) -> Verdict:
    """Compare ``shards`` with the SHA256SUMS beside them. A listed file that does not exist is missing.

    Raises:
        DataError: a folder has no SHA256SUMS, or it cannot be read.
    """
    verdict = Verdict()
    sums: dict[Path, str] = {}
    asked = set(shards)
    for folder in dict.fromkeys(shard.parent for shard in shards):
        listed = read_sums(folder)
        if not listed:
            raise DataError(f"{folder / SUMS}: no such file, or empty; write it with `megamoe data checksum --write`")
        sums |= {folder / name: digest for name, digest in listed.items()}
        verdict.missing += [str(folder / name) for name in listed if not (folder / name).exists()]
        verdict.not_asked += sum((folder / name).exists() and folder / name not in asked for name in listed)
    verdict.no_sum = [str(shard) for shard in shards if shard not in sums]
    known = [shard for shard in shards if shard in sums]
    for shard, digest in map_jobs(_digest, known, label="verify", processes=processes):
        if digest is None:
            verdict.unreadable.append(str(shard))
        elif digest != sums[shard]:
            verdict.differ.append(str(shard))
        else:
            verdict.right += 1
    return verdict


def read_sums(folder: Path) -> dict[str, str]:
    """Return name -> sum from FOLDER/SHA256SUMS; empty if there is no such file.

    Raises:
        DataError: it cannot be read, a line is not a sum, or a name leads out of the folder.
    """
    path = folder / SUMS
    try:
        if path.stat().st_size > _MAX_SUMS:
            raise DataError(f"{path}: larger than {_MAX_SUMS} bytes; this is no file of sums, remove it")
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its rights") from error
    sums = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise DataError(
                f"{path}, line {number}: is not `SHA256  NAME`; remove the file and write it again with --write"
            )
        name = match.group(3)
        if match.group(1):
            name = re.sub(r"\\([\\nr])", lambda escape: {"\\": "\\", "n": "\n", "r": "\r"}[escape.group(1)], name)
        name = name.removeprefix("./")
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise DataError(f"{path}, line {number}: {name!r} leads out of its folder; remove the line")
        sums[name] = match.group(2)
    return sums


def _digest(shard: Path) -> str | None:
    try:
        with open(shard, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _state(shard: Path) -> tuple[str, int, int]:
    state = shard.stat()
    return shard.name, state.st_size, state.st_mtime_ns


def _read_journal(folder: Path) -> dict[tuple[str, int, int], str]:
    known: dict[tuple[str, int, int], str] = {}
    with suppress(FileNotFoundError), open(folder / _JOURNAL, encoding="utf-8") as file:
        for line in file:
            with suppress(ValueError, TypeError):
                name, size, mtime, digest = json.loads(line)
                known[name, size, mtime] = digest
    return known
