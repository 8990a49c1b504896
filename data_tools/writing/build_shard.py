"""Build one shard of `megamoe data build`: ``NAME.tar``, ``NAME.parquet`` and ``NAME_stats.json`` from its items.

img2dataset writes the same three files, so tools that read its folders read ours. The tar has the samples. The parquet
has a row for every item, also for lost ones, with ``status`` and ``error_message``. The stats have the totals; they are
written last, so a shard with stats is finished.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from data_tools.sources.download import ROBOTS, Downloader, DownloadOptions
from data_tools.sources.item import FAILED_TO_DOWNLOAD, FAILED_TO_RESIZE, NO_CAPTION, SUCCESS, Chunk, Item, Loss, plain
from data_tools.writing.picture import make_picture
from data_tools.writing.records import Record, ShardWriter, read_records
from megamoe.core.errors import DataError
from megamoe.core.files import atomic_file
from megamoe.data.sample.decode import CorruptSample

_AHEAD = 4  # items in flight per thread, so that a slow host does not idle the other threads at once
_OURS = ("key", "status", "error_message", "width", "height", "original_width", "original_height", "sha256")
STATUSES = (FAILED_TO_DOWNLOAD, FAILED_TO_RESIZE, NO_CAPTION)


@dataclass(frozen=True)
class PictureOptions:
    """How pictures are resized; sides in pixels. See :func:`data_tools.writing.picture.make_picture`."""

    resize_mode: str = "no"
    image_size: int = 256
    encode_quality: int = 95


@dataclass(frozen=True)
class ShardJob:
    """Everything needed to build shard ``name`` (``00000``). An item without a key gets ``name`` and ``digits`` digits.

    ``again``: the shard exists, and only its failed downloads are retried.
    """

    name: str
    out: Path
    chunk: Chunk
    digits: int
    online: bool
    pictures: PictureOptions
    download: DownloadOptions
    again: bool = False

    @property
    def tar(self) -> Path:
        """Path of the shard."""
        return self.out / f"{self.name}.tar"

    @property
    def parquet(self) -> Path:
        """Path of the parquet with a row for every item."""
        return self.out / f"{self.name}.parquet"

    @property
    def stats(self) -> Path:
        """Path of the totals, which are written last."""
        return self.out / f"{self.name}_stats.json"


class _Outcome(NamedTuple):
    """The row of one item in the parquet, and its record, or None if it is lost for ``cause``."""

    row: dict[str, Any]
    record: Record | None
    cause: str


def make_shard(job: ShardJob) -> dict[str, Any]:
    """Build one shard and return its stats. Without a usable sample no tar is written, since readers refuse an empty one.

    Raises:
        DataError: the source changed or is damaged, or the folder cannot be written.
    """
    start = time.time()
    if not job.again:
        job.tar.unlink(missing_ok=True)
    rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    causes: Counter[str] = Counter()
    with ExitStack() as stack:
        writer: ShardWriter | None = None
        for outcome in _with_records(job, _outcomes(job)):
            rows.append(outcome.row)
            counts[outcome.row["status"]] += 1
            causes[outcome.cause] += 1
            if outcome.record is not None:
                writer = writer or stack.enter_context(ShardWriter(job.tar))
                writer.write(outcome.record)
        written = writer.bytes if writer else 0
        job.stats.unlink(missing_ok=True)  # from here to the end the three files may disagree
    if len(rows) != job.chunk.samples:
        raise DataError(f"shard {job.tar}: the source changed while it was read; write to a new folder")
    with atomic_file(job.parquet) as file:
        pq.write_table(_table(rows), file)
    end = time.time()
    stats = {
        "count": len(rows),
        "successes": counts[SUCCESS],
        **{status: counts[status] for status in STATUSES},
        "duration": end - start,
        "start_time": start,
        "end_time": end,
        "bytes": written,
        "status_dict": dict(causes.most_common()),
    }
    with atomic_file(job.stats) as file:
        file.write(json.dumps(stats, indent=4).encode())
    return stats


def _with_records(job: ShardJob, outcomes: Iterator[_Outcome]) -> Iterator[_Outcome]:
    """Yield ``outcomes``; those kept from the existing shard get their records from it, which has the same order."""
    there = read_records(job.tar, _refuse) if job.again and job.tar.exists() else iter(())
    for outcome in outcomes:
        if outcome.cause == SUCCESS and outcome.record is None:
            key = outcome.row["key"]
            record = next((each for each in there if each.key == key), None)
            if record is None:
                raise DataError(f"shard {job.tar}: sample {key} is not in it; remove the shard's three files")
            outcome = outcome._replace(record=record)
        yield outcome


def _refuse(key: str, reason: str) -> None:
    raise DataError(f"sample {key}: {reason}; remove its shard's three files")


def first_loss(job: ShardJob) -> str | None:
    """Return name and reason of the first lost item of a finished shard."""
    messages = pq.read_table(job.parquet, columns=["error_message"])["error_message"]
    return next((str(message) for message in messages if message.is_valid), None)


def _outcomes(job: ShardJob) -> Iterator[_Outcome]:
    numbered = ((item.key or f"{job.name}{n:0{job.digits}d}", item) for n, item in enumerate(job.chunk.items()))
    limit = job.download.max_bytes
    known = _known(job)
    if not job.online:
        yield from (_make(key, item, None, job.pictures, limit) for key, item in numbered)
        return
    get = Downloader(job.download).get
    with ThreadPoolExecutor(job.download.threads) as pool:
        under_way: deque[Future[_Outcome]] = deque()
        try:
            for key, item in numbered:
                if key in known:
                    under_way.append(_given(_kept(item, known[key])))
                else:
                    under_way.append(pool.submit(_make, key, item, get, job.pictures, limit))
                if len(under_way) >= _AHEAD * job.download.threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _known(job: ShardJob) -> dict[str, dict[str, Any]]:
    """Return, by key, the rows of items that need no retry: successes, unusable pictures, and refused ones."""
    if not job.again:
        return {}
    found = pq.read_table(job.parquet, columns=list(_OURS)).to_pylist()
    return {row["key"]: row for row in found if row["status"] in (SUCCESS, FAILED_TO_RESIZE) or _is_no(row)}


def _is_no(row: dict[str, Any]) -> bool:
    return row["status"] == FAILED_TO_DOWNLOAD and str(row["error_message"]).endswith(ROBOTS)


def _kept(item: Item, row: dict[str, Any]) -> _Outcome:
    if row["status"] == SUCCESS:
        cause = SUCCESS
    else:
        cause = ROBOTS if _is_no(row) else _kind_of(str(row["error_message"]).removeprefix(f"{item.name}: "))
    return _Outcome(_source_columns(item) | row, None, cause)


def _given(outcome: _Outcome) -> Future[_Outcome]:
    future: Future[_Outcome] = Future()
    future.set_result(outcome)
    return future


def _make(key: str, item: Item, get: Callable[[str], bytes] | None, options: PictureOptions, limit: int) -> _Outcome:
    row = _source_columns(item) | dict.fromkeys(_OURS) | {"key": key}
    try:
        if item.loss is not None:
            raise item.loss
        data = _read(item.picture, get, limit)
        row["sha256"] = hashlib.sha256(data).hexdigest()
        picture = make_picture(data, options.resize_mode, options.image_size, options.encode_quality)
    except Loss as loss:
        return _Outcome(row | {"status": loss.status, "error_message": f"{item.name}: {loss}"}, None, loss.cause)
    except CorruptSample as error:
        row |= {"status": FAILED_TO_RESIZE, "error_message": f"{item.name}: {error}"}
        return _Outcome(row, None, _kind_of(str(error)))
    row |= picture._asdict() | {"status": SUCCESS}
    del row["data"], row["ext"]
    members = {picture.ext: picture.data}
    if item.caption is not None:
        members["txt"] = item.caption.encode()
    members["json"] = json.dumps(row, ensure_ascii=False).encode()
    return _Outcome(row, Record(key, members), SUCCESS)


def _source_columns(item: Item) -> dict[str, Any]:
    """Return the source's columns; one with a name of ours is kept as ``source_NAME``."""
    ours: dict[str, Any] = {"caption": item.caption}
    if isinstance(item.picture, str):
        ours["url"] = plain(item.picture)
    row = {f"source_{name}" if name in ours or name in _OURS else name: value for name, value in item.columns.items()}
    return ours | {str(plain(name)): plain(value) for name, value in row.items()}


def _read(picture: Path | str | bytes, get: Callable[[str], bytes] | None, limit: int) -> bytes:
    if isinstance(picture, str):
        assert get is not None, "only online sources have URLs"
        return get(picture)
    if isinstance(picture, bytes):
        return picture
    try:
        if picture.exists() and not picture.is_file():  # reading a pipe would never end
            raise Loss(FAILED_TO_DOWNLOAD, "no regular file")
        with open(picture, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise Loss(FAILED_TO_DOWNLOAD, error.strerror or "cannot be read", f"{picture}: {error.strerror}") from error
    if len(data) > limit:
        raise Loss(FAILED_TO_DOWNLOAD, "too many bytes", f"{picture}: more than --max-bytes {limit}")
    return data


def _kind_of(message: str) -> str:
    """Return a cause that many samples share, from a message with the numbers of one."""
    return re.sub(r"\d+", "N", message.split(" (")[0])


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: Iterable[Any]) -> pa.Array:
    """Make a column. Lists, objects and mixed values become JSON text, since parquet has one type per column."""
    values = list(values)
    if not any(isinstance(value, list | dict) for value in values):
        try:
            column = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            pass
        else:  # without any value: text, so that the parquets of all shards have one schema
            return column.cast(pa.string()) if pa.types.is_null(column.type) else column
    return pa.array([None if value is None else json.dumps(value) for value in values], type=pa.string())
