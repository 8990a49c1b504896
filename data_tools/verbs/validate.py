"""Find everything that would disturb a training run or another reader: `megamoe data validate`.

Each shard is read once, front to back, by one process. A damaged shard is reported with what could be read of it, except
the sample right before the damage, which may be incomplete; the other shards are not affected. Memory: the keys of the
shards in progress, and 8 bytes (at the end 16) per sample of the set.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from data_tools.checks.contents import (
    CAPTION,
    CHECKED,
    DUPLICATE,
    JSON,
    NO_CAPTION,
    NO_PICTURE,
    PICTURE,
    content_problem,
    json_caption,
    read_member,
)
from data_tools.distribute.jobs import map_jobs
from megamoe.core.errors import DataError
from megamoe.data.sample.decode import CorruptSample
from megamoe.data.shards.held_out import key_hashes
from megamoe.data.shards.index import IMAGE_EXTENSIONS, groups, index_path, load_index
from megamoe.data.shards.tar import Member, open_for_walk, walk

DAMAGED_SHARD = "damaged shard"
APART, ELSEWHERE = "members not next to each other", "key also in another shard"
INDEX = "index not current"


class Problem(NamedTuple):
    """A problem: its cause, the key of its sample (None: the whole shard), and what was found."""

    cause: str
    key: str | None
    detail: str


@dataclass(frozen=True)
class ShardReport:
    """The report on one shard: ``good`` of its ``samples`` (keys) have no problem; ``ignored`` members belong to none."""

    shard: Path
    bytes: int
    samples: int
    good: int
    ignored: int
    problems: list[Problem]
    key_hashes: npt.NDArray[np.uint64]  # one per key, in the order of the tar
    follow_up: bool = False  # reports only keys shared with earlier shards; its samples were counted before

    def as_json(self) -> dict[str, Any]:
        """Return the report as a line of the report file."""
        return {
            "shard": str(self.shard),
            "bytes": self.bytes,
            "samples": self.samples,
            "good": self.good,
            "ignored": self.ignored,
            "causes": dict(Counter(problem.cause for problem in self.problems)),
            "problems": [problem._asdict() for problem in self.problems],
        }


class Job(NamedTuple):
    """A shard to check; ``decode``: decode its pictures, and do not only check their first bytes."""

    shard: Path
    decode: bool


def validate_shards(shards: Sequence[Path], decode: bool, processes: int | None = None) -> Iterator[ShardReport]:
    """Yield a report for each of ``shards`` in order, then one more for each that shares keys with an earlier one.

    Keys of different shards are compared by 64-bit hashes: with a billion keys, about one set in forty has a pair that is
    reported by chance.
    """
    hashes = []
    for _, report in map_jobs(
        validate_shard, [Job(shard, decode) for shard in shards], label="validate", processes=processes
    ):
        hashes.append(report.key_hashes)
        yield report
    yield from _shared_keys(shards, hashes)


def validate_shard(job: Job) -> ShardReport:
    """Check one shard, and return its report with everything that is wrong."""
    check = _ShardCheck(job.decode)
    size = 0
    try:
        file, before = open_for_walk(job.shard)
        size = before.st_size
        with file:
            for key, group in groups(check.counted(walk(job.shard, file, size))):
                check.group(file, key, group)
            after = os.fstat(file.fileno())
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise DataError(f"shard {job.shard}: changed while it was read; wait until it is written")
        check.finish()
        check.index(job.shard)
    except (DataError, OSError) as error:
        check.finish()
        check.problems.append(Problem(DAMAGED_SHARD, None, str(error)))
    return ShardReport(
        job.shard,
        size,
        len(check.seen),
        len(check.seen) - len({problem.key for problem in check.problems} - {None}),
        check.members - check.grouped,
        check.problems,
        key_hashes(check.seen),
    )


class _ShardCheck:
    """Check one shard, group by group; holds what was found so far."""

    def __init__(self, decode: bool) -> None:
        self.problems: list[Problem] = []
        self.seen: dict[str, tuple[str, ...]] = {}  # key -> its extensions
        self.members = self.grouped = 0
        self._decode = decode
        self._lacking: dict[str, set[str]] = {}  # judged at the end, since the rest of a sample may still follow
        self._apart: set[str] = set()
        self._rows: list[tuple[int, int, int, int]] = []  # what the index should contain

    def counted(self, members: Iterator[Member]) -> Iterator[Member]:
        for member in members:
            self.members += 1
            yield member

    def group(self, file: BinaryIO, key: str, members: dict[str, Member]) -> None:
        self.grouped += len(members)
        before = self.seen.get(key)
        if before is not None and not set(before).isdisjoint(members):
            self.problems.append(Problem(DUPLICATE, key, f"its {', '.join(members)} again at byte {_start(members)}"))
            return
        if before is not None and key not in self._apart:
            self._apart.add(key)
            self.problems.append(Problem(APART, key, f"{', '.join(members)} at byte {_start(members)}, after other keys"))
        self.seen[key] = (*(before or ()), *members)
        text = self._contents(file, key, members)
        image = next((ext for ext in members if ext in IMAGE_EXTENSIONS), None)
        found = {what for what, ext in ((NO_PICTURE, image), (NO_CAPTION, text)) if ext is not None}
        if before is None:
            self._lacking[key] = {NO_PICTURE, NO_CAPTION} - found
            if image is not None and text is not None:
                self._rows.append((*members[image][1:3], *members[text][1:3]))
        elif key in self._lacking:
            self._lacking[key] -= found
        if not self._lacking.get(key):
            self._lacking.pop(key, None)

    def finish(self) -> None:
        """Report what samples still lack after the last member."""
        for key, lacking in self._lacking.items():
            self.problems += [Problem(cause, key, f"has {', '.join(self.seen[key])}") for cause in sorted(lacking)]
        self._lacking = {}

    def index(self, shard: Path) -> None:
        """Compare the index beside the shard, if there is one, with what was read."""
        if not index_path(shard, None).exists():
            return
        try:
            table = load_index(shard, None).table[:, [0, 1, 4, 5]]
        except DataError as error:
            self.problems.append(Problem(INDEX, None, str(error)))
            return
        if not np.array_equal(table, np.array(self._rows, dtype=np.int64).reshape(-1, 4)):
            detail = f"index {index_path(shard, None)}: not of this shard; run `megamoe data index {shard}`"
            self.problems.append(Problem(INDEX, None, detail))

    def _contents(self, file: BinaryIO, key: str, members: dict[str, Member]) -> str | None:
        """Check the bytes of each member, and return the extension of the caption; None if there is none."""
        text = "txt" if "txt" in members else None
        for ext in CHECKED:
            if ext not in members:
                continue
            try:
                data = read_member(file, members[ext])
            except CorruptSample as corrupt:
                cause = PICTURE if ext in IMAGE_EXTENSIONS else CAPTION if ext == "txt" else JSON
                self.problems.append(Problem(cause, key, f"{ext}: {corrupt}"))
                continue
            if wrong := content_problem(ext, data, self._decode):
                self.problems.append(Problem(wrong[0], key, wrong[1]))
            elif ext == "json" and text is None:
                has, fault = json_caption(data)
                text = "json" if has else None
                if fault:
                    self.problems.append(Problem(CAPTION, key, fault))
        return text


def _shared_keys(shards: Sequence[Path], hashes: list[npt.NDArray[np.uint64]]) -> Iterator[ShardReport]:
    together = np.sort(np.concatenate(hashes))
    shared = np.unique(together[1:][together[1:] == together[:-1]])
    del together
    if not len(shared):
        return
    owner = np.full(len(shared), -1, dtype=np.int64)  # the first shard that has the key
    for number, (shard, own) in enumerate(zip(shards, hashes, strict=True)):
        places = np.flatnonzero(np.isin(own, shared))
        which = np.searchsorted(shared, own[places])
        later = owner[which] >= 0
        owner[which[~later]] = number
        if not later.any():
            continue
        wanted = {int(place): shards[int(first)] for place, first in zip(places[later], owner[which[later]], strict=True)}
        problems = [Problem(ELSEWHERE, key, f"also in {wanted[place]}") for place, key in _keys(shard, wanted)]
        yield ShardReport(shard, 0, 0, 0, 0, problems, hashes[0][:0], follow_up=True)


def _keys(shard: Path, places: dict[int, Path]) -> Iterator[tuple[int, str]]:
    """Yield the keys at ``places``. Only hashes were kept, so the headers are read again."""
    file, state = open_for_walk(shard)
    seen: set[str] = set()
    with file:
        try:
            for key, _ in groups(walk(shard, file, state.st_size)):
                if key not in seen and len(seen) in places:
                    yield len(seen), key
                seen.add(key)
        except DataError:  # reported by the first pass; all keys before the damage have been yielded
            return


def _start(members: dict[str, Member]) -> int:
    return min(member.offset for member in members.values())
