"""Write the same samples in shards of equal size, in order or globally shuffled: `megamoe data reshard`.

First the headers of all shards are read once, to record where each sample lies (24 bytes per sample in a file). Then every
output shard fetches its samples from wherever they lie. So output shards are independent: they are written in parallel,
and a killed run resumes with the missing ones. With ``shuffle``, each sample takes one read at a random place. The
alternative, bucket files, reads and writes everything twice and needs as much free space again; it would be faster only
if seeks are slow (spinning disks). For one output shard, each source shard is read from front to back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.writing.account import Account
from data_tools.writing.out_folder import OutFolder, Source, open_source
from data_tools.writing.records import Record, ShardWriter
from data_tools.writing.shuffle import shuffled
from data_tools.writing.spans import SPAN, ShardToScan, read_span, scan_shard
from megamoe.core.errors import DataError
from megamoe.core.files import atomic_file

_TAR_RECORD = 10240  # bytes; tars are padded to a multiple, after 1,024 bytes that mark the end
_TAR_END = 1024
_BYTES_PER_POSITION = 64  # bytes of memory while a piece of the order is sorted
_PIECE = 1 << 20  # samples whose sizes are processed together

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Shard:
    """An output shard: positions ``start`` to ``end`` of the order stored in ``plan``."""

    name: str
    start: int
    end: int
    target: Path
    plan: Path
    memory: int


def reshard_shards(
    spec: str,
    out: Path,
    *,
    shard_size: int | None = None,
    shard_bytes: int | None = None,
    seed: int | None = None,
    memory: int = 4 << 30,
    processes: int | None = None,
    dry_run: bool = False,
) -> Account:
    """Write all samples of the shards ``spec`` to ``out/00000.tar``, ``out/00001.tar``, ...

    A repeated key within an output shard becomes the first free one of ``<key>-2``, ``<key>-3``, ...; such samples are
    counted as renamed. Only the name in the tar changes, not the content of a json. A later split by keys uses the new
    key.

    Args:
        spec: the shards.
        out: folder for the new shards.
        shard_size: samples of each shard except the last; give either this or ``shard_bytes``.
        shard_bytes: maximum size of a tar; only a tar with a single larger sample exceeds it.
        seed: seed of a uniform permutation of all samples; None: the order stays.
        memory: bytes that all processes together use for samples, and before that for sorting the order.
        processes: see :func:`data_tools.distribute.jobs.map_jobs`.
        dry_run: count without writing anything.

    Raises:
        DataError: the shards cannot be read or hold no sample, or ``out`` belongs to something else.
    """
    assert (shard_size is None) != (shard_bytes is None)
    source = open_source(spec)
    request = {"source": source.state, "shard_size": shard_size, "shard_bytes": shard_bytes, "seed": seed}
    folder = OutFolder(out, "reshard", request, dry_run=dry_run)
    if (result := folder.finished()) is not None:
        folder.refuse_others(result.shards)
        return result
    with folder.scratch() as plan:
        scanned = _scan(folder, source, plan, processes)
        if not scanned.kept:
            raise DataError(f"shards {spec!r}: hold no sample; check them with `megamoe data index`")
        _write_order(plan, scanned.kept, seed, memory // _BYTES_PER_POSITION)
        ends = _ends(plan, scanned.kept, shard_size, shard_bytes)
        width = max(5, len(str(len(ends) - 1)))
        names = [f"{number:0{width}d}.tar" for number in range(len(ends))]
        folder.refuse_others(names)
        if dry_run:
            scanned.shards = dict.fromkeys(names, 0)
            return scanned
        share = memory // (processes or len(os.sched_getaffinity(0)))
        jobs = [
            _Shard(name, start, end, out / name, plan, share)
            for name, start, end in zip(names, [0, *ends], ends, strict=False)
        ]
        result = folder.do(_write_shard, jobs, label="write", processes=processes)
    assert result.kept == scanned.kept
    for name, reason in scanned.lost:
        result.lose(name, reason)
    folder.close(result)
    return result


def _scan(folder: OutFolder, source: Source, plan: Path, processes: int | None) -> Account:
    """Write to ``plan`` where the samples of all shards lie, and the number of the first sample of each shard."""
    jobs = [
        ShardToScan(f"scan-{i:06d}", shard, label, plan / f"scan-{i:06d}.spans")
        for i, (shard, label) in enumerate(zip(source.shards, source.labels, strict=True))
    ]
    account = folder.do(scan_shard, jobs, label="scan", processes=processes)
    starts = [0]
    with atomic_file(plan / "spans") as file:
        for job in jobs:
            content = job.target.read_bytes()
            starts.append(starts[-1] + len(content) // SPAN.itemsize)
            file.write(content)
    with atomic_file(plan / "shards.json") as file:
        paths = [str(shard.absolute()) for shard in source.shards]
        file.write(json.dumps({"paths": paths, "starts": starts}).encode())
    return account


def _write_order(plan: Path, samples: int, seed: int | None, piece: int) -> None:
    """Write which sample comes at each position, as raw int64."""
    pieces = (
        (np.arange(first, min(first + _PIECE, samples)) for first in range(0, samples, _PIECE))
        if seed is None
        else shuffled(samples, seed, max(piece, 1))
    )
    with atomic_file(plan / "order") as file:
        for ids in pieces:
            file.write(ids.astype("<i8").tobytes())


def _ends(plan: Path, samples: int, shard_size: int | None, shard_bytes: int | None) -> list[int]:
    """Return the position at which each output shard ends."""
    if shard_size is not None:
        return [*range(shard_size, samples, shard_size), samples]
    assert shard_bytes is not None
    room = shard_bytes // _TAR_RECORD * _TAR_RECORD - _TAR_END
    order, spans = _open(plan, "order", "<i8"), _open(plan, "spans", SPAN)
    ends, filled = [], 0
    for first in range(0, samples, _PIECE):
        sizes: list[int] = spans["size"][order[first : first + _PIECE]].tolist()
        for position, size in enumerate(sizes, first):
            if filled and filled + size > room:
                ends.append(position)
                filled = 0
            filled += size
    return [*ends, samples]


def _write_shard(job: _Shard) -> Account:
    account = Account()
    order, spans = _open(job.plan, "order", "<i8"), _open(job.plan, "spans", SPAN)
    shards = json.loads((job.plan / "shards.json").read_bytes())
    ids = np.asarray(order[job.start : job.end])
    keys = _Keys()
    with ShardWriter(job.target) as writer:
        for window in _windows(spans["length"][ids], job.memory):
            for record in _fetch(ids[window], spans, shards["paths"], np.asarray(shards["starts"])):
                key = keys.free(record.key)
                if key != record.key:
                    account.kept_as["renamed"] += 1
                writer.write(record._replace(key=key))
    account.read = account.kept = writer.samples
    account.shards[job.name] = job.target.stat().st_size
    return account


def _windows(lengths: Ids, memory: int) -> Iterator[slice]:
    """Cut positions into runs whose samples fit in ``memory`` together; a larger sample is its own run."""
    start = held = 0
    for position, length in enumerate(lengths.tolist()):
        if held and held + length > memory:
            yield slice(start, position)
            start, held = position, 0
        held += length
    yield slice(start, len(lengths))


def _fetch(ids: Ids, spans: np.ndarray, paths: Sequence[str], starts: Ids) -> list[Record]:
    """Return the samples ``ids`` in that order, but read them in the order of the shards."""
    records: dict[int, Record] = {}
    ascending = np.sort(ids)
    shards = np.searchsorted(starts, ascending, side="right") - 1
    for together in np.split(ascending, np.flatnonzero(np.diff(shards)) + 1):
        path = Path(paths[np.searchsorted(starts, together[0], side="right") - 1])
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"shard {path}: cannot be opened ({error.strerror}); check the path") from error
        try:
            for i in together.tolist():
                start, length, _ = spans[i].tolist()
                records[i] = read_span(path, file, start, length)
        finally:
            os.close(file)
    return [records.pop(i) for i in ids.tolist()]


def _open(plan: Path, name: str, dtype: np.dtype | str) -> np.ndarray:
    return np.memmap(plan / name, dtype=dtype, mode="r")


class _Keys:
    """Make the keys of one output shard unique."""

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._next: dict[str, int] = {}

    def free(self, key: str) -> str:
        """Return ``key``, or if it is used, ``<key>-<n>`` with the first free n from 2 on."""
        free = key
        while free in self._used:
            number = self._next.get(key, 2)
            self._next[key] = number + 1
            free = f"{key}-{number}"
        self._used.add(free)
        return free
