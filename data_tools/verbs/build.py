"""Build image-text shards from a folder of pictures, a table or a list of URLs: `megamoe data build`.

The plan is written to ``OUT/build.json`` first. A later call with the same source and options resumes where the last one
ended. One with others is refused, since its shards would not fit the existing ones.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data_tools.distribute.jobs import map_jobs
from data_tools.sources.columns import Names
from data_tools.sources.detect import open_source
from data_tools.sources.download import DownloadOptions
from data_tools.sources.item import FAILED_TO_DOWNLOAD, Source
from data_tools.writing.build_shard import STATUSES, PictureOptions, ShardJob, first_loss, make_shard
from megamoe.core.errors import DataError, UserError
from megamoe.core.files import atomic_file

PLAN = "build.json"
_FORMAT = 1
_SHOWN = 5  # causes named in the text of the report


@dataclass(frozen=True)
class BuildOptions:
    """How shards are built. ``shard_size`` is in samples; ``input_format`` None: detected."""

    shard_size: int = 10_000
    input_format: str | None = None
    names: Names = field(default_factory=Names)
    pictures: PictureOptions = field(default_factory=PictureOptions)
    download: DownloadOptions = field(default_factory=DownloadOptions)


@dataclass(frozen=True)
class Report:
    """The outcome of a build: ``totals`` as in the shards' stats; ``done`` shards were finished before."""

    source: Source
    out: Path
    shards: int
    done: int
    totals: Counter[str]
    causes: Counter[str]
    first_lost: str | None

    @property
    def lost(self) -> int:
        """Number of samples that are in no shard."""
        return self.totals["count"] - self.totals["successes"]

    def as_dict(self) -> dict[str, Any]:
        """Return the report for ``--json``."""
        keys = ("count", "successes", *STATUSES, "bytes")
        found = {"format": self.source.kind, "shards": self.shards, "shards_done_before": self.done}
        causes = {"status_dict": dict(self.causes.most_common()), "first_lost": self.first_lost}
        return found | {key: self.totals[key] for key in keys} | causes

    def __str__(self) -> str:
        text = f"{self.out}: {self.totals['successes']} samples in {self.shards} shard{'s' * (self.shards != 1)}"
        if self.done:
            text += f" ({self.done} made before)"
        if not self.lost:
            return text
        first = f"; the first: {self.first_lost}" if self.first_lost else ""
        causes = [f"{count} {cause}" for cause, count in self.causes.most_common() if cause != "success"]
        more = f"; {len(causes) - _SHOWN} more causes" if len(causes) > _SHOWN else ""
        return (
            f"{text}; {self.lost} of {self.totals['count']} lost: {'; '.join(causes[:_SHOWN])}{more}{first} "
            "(all: error_message in the .parquet beside each shard)"
        )


def plan(source: Path, options: BuildOptions) -> Source:
    """Detect what ``source`` is and cut it into shards, without writing anything.

    Raises:
        DataError: as :func:`data_tools.sources.detect.open_source`.
    """
    return open_source(source, options.shard_size, options.names, options.input_format)


def build(
    path: Path,
    out: Path,
    options: BuildOptions,
    processes: int | None = None,
    *,
    cluster: str | None = None,
    retry_failed: bool = False,
) -> Report:
    """Build the shards of the source ``path`` in ``out``, in ``processes`` processes (None: one per core).

    When downloading, at most ``per_host`` shards are in progress, and each gets its share of ``per_host``: the limit
    holds for all of them together, on a cluster too. With ``retry_failed``, failed downloads of finished shards are
    retried; the samples already in them stay.

    Raises:
        DataError: the source cannot be read, or ``out`` holds something else.
        UserError: more processes than ``per_host`` were asked for.
    """
    if out.exists() and path.exists() and out.samefile(path):
        raise DataError(f"{out}: is the source; write the shards to another folder")
    source = plan(path, options)
    download, at_most = options.download, None
    if source.online:
        if processes is not None and processes > download.per_host:
            raise UserError(
                f"--processes {processes}: more than --per-host {download.per_host}, which all of them share; "
                "raise --per-host or use fewer processes"
            )
        wanted = processes or (download.per_host if cluster else len(os.sched_getaffinity(0)))
        at_most = min(wanted, download.per_host, len(source.chunks))
        download = replace(download, per_host=download.per_host // at_most)
        processes = processes if cluster else at_most
    elif retry_failed:
        raise UserError(f"--retry-failed: nothing is downloaded for {path}; omit --retry-failed")
    _claim(out, source, options)
    digits = len(str(options.shard_size - 1))
    jobs = [
        ShardJob(f"{number:05d}", out, chunk, digits, source.online, options.pictures, download)
        for number, chunk in enumerate(source.chunks)
    ]
    done = [job for job in jobs if _is_done(job)]
    again = [replace(job, again=True) for job in done if retry_failed and _stats(job)[FAILED_TO_DOWNLOAD]]
    waiting = [*(job for job in jobs if not _is_done(job)), *again]
    for _ in map_jobs(make_shard, waiting, label="build", processes=processes, at_most=at_most):
        pass
    return _report(source, out, jobs, len(jobs) - len(waiting))


def _claim(out: Path, source: Source, options: BuildOptions) -> None:
    """Record the source and options of ``out``, or check that they are the recorded ones."""
    wanted = {"format": _FORMAT, "source": {"kind": source.kind, "fingerprint": source.fingerprint}, **_lasting(options)}
    wanted = json.loads(json.dumps(wanted, default=str))
    path = out / PLAN
    if path.exists():
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read; remove {out} or write to another folder") from error
        if found != wanted:
            raise DataError(f"{out}: begun with another {_difference(found, wanted)}; remove it or write to another folder")
        for left in out.glob(".*.tmp"):  # unfinished files of a killed build
            left.unlink(missing_ok=True)
    elif out.is_dir() and next(out.glob("*.tar"), None):
        raise DataError(f"{out}: holds shards that are not of this build; write to another folder")
    else:
        with atomic_file(path) as file:
            file.write(json.dumps(wanted, indent=4).encode())


def _lasting(options: BuildOptions) -> dict[str, Any]:
    """Return the options that change the content of the shards, in contrast to the speed of downloads."""
    download = {key: getattr(options.download, key) for key in ("max_bytes", "disallowed", "private_hosts")}
    return {
        "shard_size": options.shard_size,
        "columns": asdict(options.names),
        "pictures": asdict(options.pictures),
        "download": download,
    }


def _difference(found: Any, wanted: dict[str, Any]) -> str:
    if not isinstance(found, dict):
        return "plan"
    for key, value in wanted.items():
        other = found.get(key)
        if other != value and isinstance(value, dict):
            return f"{key}: {_difference(other, value)}"
        if other != value:
            return f"{key} ({other}, now {value})"
    return "plan"


def _is_done(job: ShardJob) -> bool:
    if not job.stats.exists():
        return False
    return job.parquet.exists() and (job.tar.exists() or _stats(job)["successes"] == 0)


def _stats(job: ShardJob) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(job.stats.read_bytes())
        int(content["successes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{job.stats}: cannot be read; remove it to build the shard again") from error
    return content


def _report(source: Source, out: Path, jobs: Sequence[ShardJob], done: int) -> Report:
    totals: Counter[str] = Counter()
    causes: Counter[str] = Counter()
    first: str | None = None
    for job in jobs:
        stats = _stats(job)
        if first is None and stats["successes"] < stats["count"]:
            first = first_loss(job)
        causes.update(stats["status_dict"])
        totals.update({key: stats[key] for key in ("count", "successes", *STATUSES, "bytes")})
    return Report(source, out, len(jobs), done, totals, causes, first)
