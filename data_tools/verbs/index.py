"""Index many shards at once, and skip those with a current index: `megamoe data index`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_tools.distribute.jobs import map_jobs
from megamoe.core.errors import DataError
from megamoe.data.shards.index import ShardIndex, build_index, index_path, load_index, write_index

_NAMED = 10  # lost samples named per shard; its index names all


@dataclass
class IndexTotals:
    """The result of :func:`index_shards`. Samples are counted over all shards with an index, including skipped ones."""

    shards: int
    samples: int = 0
    incomplete: int = 0
    duplicates: int = 0
    skipped: int = 0  # shards whose index was current
    unusable: list[dict[str, str]] = field(default_factory=list)  # {"shard": path, "reason": text}
    bytes: int = 0  # sum over the shards with an index
    seconds: float = 0.0


class _Task(NamedTuple):
    shard: Path
    out: Path | None
    force: bool


class _Outcome(NamedTuple):
    """The result for one shard; unless it is ``unusable``, the numbers are those of its index."""

    samples: int = 0
    incomplete: int = 0
    duplicates: int = 0
    bytes: int = 0
    skipped: bool = False
    unusable: str = ""
    lost: str = ""  # names the lost samples of a shard that was read now


def index_shards(
    shards: Sequence[Path],
    out: Path | None,
    *,
    say: Callable[[str], None],
    force: bool = False,
    processes: int | None = None,
) -> IndexTotals:
    """Write the index of each of ``shards``, beside it or into ``out``, unless it has one that is current.

    ``say`` receives one line for each shard that cannot be used or that has lost samples; the other shards are still
    indexed. After a kill, the same call does the rest. ``force`` reads all shards. For ``processes`` see :func:`map_jobs`.
    """
    began = time.monotonic()
    totals = IndexTotals(len(shards))
    tasks = [_Task(shard, out, force) for shard in shards]
    for task, outcome in map_jobs(_index, tasks, label="index", processes=processes):
        totals.samples += outcome.samples
        totals.incomplete += outcome.incomplete
        totals.duplicates += outcome.duplicates
        totals.bytes += outcome.bytes
        totals.skipped += outcome.skipped
        if outcome.unusable:
            totals.unusable.append({"shard": str(task.shard), "reason": outcome.unusable})
        if line := outcome.unusable or outcome.lost:
            say(line)
    totals.seconds = time.monotonic() - began
    return totals


def current_index(shard: Path, out: Path | None) -> ShardIndex | None:
    """Return the index of ``shard`` if it can be read and is not older than the shard; otherwise None."""
    try:
        return load_index(shard, out)
    except DataError:
        return None


def _index(task: _Task) -> _Outcome:
    shard, out, force = task
    index = None if force else current_index(shard, out)
    skipped = index is not None
    if index is None:
        try:
            index = build_index(shard)
        except DataError as error:
            return _Outcome(unusable=str(error))
        write_index(index, index_path(shard, out))
    header = index.header
    lost = "" if skipped else _lost_samples(shard, index)
    return _Outcome(header.samples, header.incomplete, header.duplicates, header.bytes, skipped, "", lost)


def _lost_samples(shard: Path, index: ShardIndex) -> str:
    problems = [f"{key}: {why}" for key, why in index.incomplete] + [f"{key}: twice" for key in index.duplicates]
    if not problems:
        return ""
    more = f"; and {len(problems) - _NAMED} more, which its index names" if len(problems) > _NAMED else ""
    return f"shard {shard}: {len(problems)} samples lost ({'; '.join(problems[:_NAMED])}{more})"
