"""Count what is in shards for `megamoe data stats`, in one pass and bounded memory. Pictures are not decoded.

The figures cover the samples that training would use: a picture and a caption under one key, the first with that key.
The other samples are lost; they are counted by what they lack.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from heapq import nsmallest
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import simplejpeg
from PIL import Image

from data_tools.checks.contents import CAPTION, DUPLICATE, NO_CAPTION, NO_PICTURE, PICTURE, read_member
from data_tools.distribute.jobs import map_jobs
from data_tools.stats.sketch import Sketch
from megamoe.core.errors import DataError
from megamoe.data.sample.decode import CorruptSample, decode_caption
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.shards.index import IMAGE_EXTENSIONS, groups
from megamoe.data.shards.labels import shard_labels
from megamoe.data.shards.tar import Member, open_for_walk, walk

MAX_COLUMNS = 64  # json keys with numbers; with more, the keys themselves are data
MAX_NAME = 80  # characters kept of a json key or an extension
MAX_WORDS = 200_000  # at most; then the rarer half is pruned, and words that come again are undercounted
_HEADER = 1 << 16  # bytes that usually hold the header of a picture
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_LONGEST_WORD = 40
_SPARE = 2  # pictures kept for each one shown, since some cannot be decoded


class Shown(NamedTuple):
    """A sample for the page. ``draw`` is a hash of its id: the smallest are a random choice, in any order of reading."""

    draw: int
    id: str
    caption: str
    shard: Path
    member: Member


@dataclass
class Stats:
    """Figures of some shards. The figures of a set are the sum over its shards."""

    shards: int = 0
    bytes: int = 0
    samples: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    damaged: list[str] = field(default_factory=list)  # shards: only what lies before the damage is counted
    formats: Counter[str] = field(default_factory=Counter)
    extensions: Counter[str] = field(default_factory=Counter)
    numbers: dict[str, Sketch] = field(default_factory=dict)
    columns: dict[str, Sketch] = field(default_factory=dict)
    not_finite: Counter[str] = field(default_factory=Counter)
    more_columns: bool = False
    words: Counter[str] = field(default_factory=Counter)
    words_are_lower_bounds: bool = False
    shown: list[Shown] = field(default_factory=list)

    def merge(self, other: Stats, sample: int) -> None:
        """Add ``other``, and keep as many samples to show as ``sample`` needs."""
        for name in ("shards", "bytes", "samples"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("lost", "formats", "extensions", "not_finite", "words"):
            getattr(self, name).update(getattr(other, name))
        self.damaged += other.damaged
        for name, sketch in other.numbers.items():
            self.numbers.setdefault(name, Sketch()).merge(sketch)
        for name, sketch in other.columns.items():
            if name in self.columns or len(self.columns) < MAX_COLUMNS:
                self.columns.setdefault(name, Sketch()).merge(sketch)
            else:
                self.more_columns = True
        self.more_columns = self.more_columns or other.more_columns
        self.words_are_lower_bounds = self.words_are_lower_bounds or other.words_are_lower_bounds
        self.prune_rare_words()
        self.shown = nsmallest(_SPARE * sample, self.shown + other.shown)

    def prune_rare_words(self) -> None:
        """Remove the rarer half of the words when there are more than MAX_WORDS."""
        if len(self.words) > MAX_WORDS:
            self.words = Counter(dict(ranked(self.words, MAX_WORDS // 2)))
            self.words_are_lower_bounds = True

    def as_json(self) -> dict[str, Any]:
        """Return the content of ``stats.json``; the same shards give the same."""
        return {
            "shards": self.shards,
            "bytes": self.bytes,
            "samples": self.samples,
            "left_out": dict(ranked(self.lost)),
            "damaged_shards": self.damaged,
            "formats": dict(ranked(self.formats)),
            "extensions": dict(ranked(self.extensions)),
            **{name: sketch.as_json() for name, sketch in self.numbers.items()},
            "json": {name: sketch.as_json() for name, sketch in sorted(self.columns.items())},
            "json_not_finite": dict(ranked(self.not_finite)),
            "json_columns_left_out": self.more_columns,
            "words": dict(ranked(self.words, 200)),
            "words_are_lower_bounds": self.words_are_lower_bounds,
        }


class Job(NamedTuple):
    """A shard to count: its path, its name in sample ids, and the options."""

    shard: Path
    label: str
    tokenizer: Path | None
    sample: int


def collect_stats(
    shards: Sequence[Path], *, tokenizer: Path | None = None, sample: int = 0, processes: int | None = None
) -> Stats:
    """Count ``shards``. The result is the same for any number of processes.

    Args:
        shards: tars; damaged ones are counted up to the damage and named in the result.
        tokenizer: sentencepiece model to count the tokens of captions with.
        sample: number of pictures that the page will show.
        processes: as for :func:`data_tools.distribute.jobs.map_jobs`.

    Raises:
        DataError: the tokenizer cannot be used.
    """
    if tokenizer:
        _tokenizer(tokenizer)  # fails here, in one line, and not in a worker
    jobs = [
        Job(shard, label, tokenizer, sample)
        for shard, label in zip(shards, shard_labels([str(shard) for shard in shards]), strict=True)
    ]
    total = Stats(numbers={name: Sketch() for name in ("width", "height", "aspect", "image_bytes", "caption_characters")})
    for _, part in map_jobs(shard_stats, jobs, label="stats", processes=processes):
        total.merge(part, sample)
    return total


def shard_stats(job: Job) -> Stats:
    """Count one shard."""
    stats = Stats(shards=1)
    seen: set[str] = set()
    try:
        file, state = open_for_walk(job.shard)
        stats.bytes = state.st_size
        with file:
            for key, members in groups(walk(job.shard, file, state.st_size)):
                _count_names(stats.extensions, members)
                if key in seen:
                    stats.lost[DUPLICATE] += 1
                    continue
                seen.add(key)
                _add(stats, job, file, key, members)
    except (DataError, OSError) as error:
        stats.damaged.append(str(error))
    return stats


def ranked(counts: Counter[str], most: int | None = None) -> list[tuple[str, int]]:
    """Return the counts, the most frequent first and equal ones by name."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]


def picture_size(data: bytes) -> tuple[str, int, int]:
    """Return format, width and height of a picture, from its header.

    Raises:
        CorruptSample: it is not a JPEG, PNG or WebP, or its header is damaged.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            return "JPEG", width, height
        with Image.open(io.BytesIO(data), formats=["PNG", "WEBP"]) as image:
            return str(image.format), *image.size
    except Exception as error:  # decoders raise errors of every type for bad bytes
        raise CorruptSample("image: no header of a JPEG, PNG or WebP") from error


def _add(stats: Stats, job: Job, file: BinaryIO, key: str, members: dict[str, Member]) -> None:
    image = next((ext for ext in members if ext in IMAGE_EXTENSIONS), None)
    record = _record(file, members)
    cause = NO_PICTURE
    try:
        if image is None:
            raise CorruptSample("no picture")
        cause = CAPTION if "txt" in members or isinstance(record.get("caption"), str) else NO_CAPTION
        caption = _caption(file, members, record)
        cause = PICTURE
        kind, width, height = _size(file, members[image])
    except CorruptSample:
        stats.lost[cause] += 1
        return
    stats.samples += 1
    stats.formats[kind] += 1
    numbers = {
        "width": width,
        "height": height,
        "aspect": width / height,
        "image_bytes": members[image].size,
        "caption_characters": len(caption),
    }
    if job.tokenizer:
        numbers["caption_tokens"] = len(_tokenizer(job.tokenizer).encode(caption))
    for name, value in numbers.items():
        stats.numbers.setdefault(name, Sketch()).add(value)
    _add_columns(stats, record)
    stats.words.update(word.lower()[:_LONGEST_WORD] for word in _WORD.findall(caption))
    stats.prune_rare_words()
    if job.sample:
        name = f"{job.label}#{key}"
        draw = int.from_bytes(blake2b(os.fsencode(name), digest_size=8).digest(), "big")
        stats.shown.append(Shown(draw, name, caption[:500], job.shard, members[image]))
        if len(stats.shown) > 100 * _SPARE * job.sample:
            stats.shown = nsmallest(_SPARE * job.sample, stats.shown)


def _add_columns(stats: Stats, record: dict[str, Any]) -> None:
    for name, value in record.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        try:
            number = float(value)
        except OverflowError:  # an integer of more than 300 digits
            number = math.inf
        name = name[:MAX_NAME]
        if name not in stats.columns and len(stats.columns) >= MAX_COLUMNS:
            stats.more_columns = True
        elif math.isfinite(number):
            stats.columns.setdefault(name, Sketch()).add(number)
        else:
            stats.columns.setdefault(name, Sketch())
            stats.not_finite[name] += 1


def _record(file: BinaryIO, members: dict[str, Member]) -> dict[str, Any]:
    if "json" not in members:
        return {}
    try:
        content = json.loads(read_member(file, members["json"]).decode("utf-8"))
    except (ValueError, RecursionError, CorruptSample):  # `validate` reports it; the sample itself may be good
        return {}
    return content if isinstance(content, dict) else {}


def _caption(file: BinaryIO, members: dict[str, Member], record: dict[str, Any]) -> str:
    if "txt" in members:
        return decode_caption(read_member(file, members["txt"]), "txt")
    return decode_caption(json.dumps({"caption": record.get("caption")}).encode(), "json")


def _size(file: BinaryIO, member: Member) -> tuple[str, int, int]:
    file.seek(member.offset)
    start = file.read(min(member.size, _HEADER))
    try:
        return picture_size(start)
    except CorruptSample:
        if len(start) == member.size:
            raise
    return picture_size(read_member(file, member))  # a colour profile or a preview precedes the size


def _count_names(counts: Counter[str], members: dict[str, Member]) -> None:
    for ext in members:
        name = ext[:MAX_NAME]
        counts[name if name in counts or len(counts) < MAX_COLUMNS else "(others)"] += 1


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(os.fspath(path))
