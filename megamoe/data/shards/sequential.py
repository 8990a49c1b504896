"""Read shards front to back, sample by sample, for evaluation and the data tools."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from megamoe.core.errors import DataError
from megamoe.data.remote.cache import CacheUnusable, ShardCache
from megamoe.data.remote.download import ShardUnavailable
from megamoe.data.sample.decode import CorruptSample, decode_caption, decode_image
from megamoe.data.shards.expand import expand_shards, is_remote
from megamoe.data.shards.held_out import held_out, key_hashes
from megamoe.data.shards.index import SampleEntry, build_index, index_path, load_index
from megamoe.data.shards.labels import shard_labels
from megamoe.data.shards.storage import Storage

logger = logging.getLogger(__name__)
_Read = TypeVar("_Read")
OnLost = Callable[[str, str], None]


@dataclass(frozen=True)
class Sample:
    """A decoded sample: id ``<shard>#<key>``, image uint8 (H, W, 3), caption."""

    id: str
    image: npt.NDArray[np.uint8]
    caption: str


def read_samples(
    specs: Sequence[str],
    index_dir: Path | None,
    image_size: int,
    limit: int | None = None,
    on_lost: OnLost | None = None,
    *,
    on_bad: OnLost | None = None,
    cache: ShardCache | None = None,
    share: float = 1.0,
) -> Iterator[Sample]:
    """Yield the samples of the shards in order, at most ``limit``, pictures resized to ``image_size``.

    Shards that are not local files are read from ``cache``. With a ``share`` below 1, only the held-out samples are read:
    those that a run with this ``data.held_out`` never trains on.

    ``on_lost(id, reason)`` is called for each lost sample, including incomplete ones and repeated keys; without it, each
    is logged as a warning. ``on_bad(shard, reason)`` is called for a shard that cannot be used; the rest of that shard is
    not read.

    Raises:
        DataError: a shard cannot be used, and there is no ``on_bad``.
    """
    with closing(Storage(cache)) as storage:

        def read(name: str, shard: str, entry: SampleEntry) -> Sample:
            image, text = storage.read(shard, (entry.image, entry.text))
            caption = decode_caption(text, entry.text_ext)
            return Sample(name, decode_image(image, image_size), caption)

        yield from islice(_read_all(read, specs, index_dir, on_lost or _log, on_bad, storage, share), limit)


def read_captions(specs: Sequence[str], index_dir: Path | None = None, on_lost: OnLost | None = None) -> Iterator[str]:
    """Yield the captions of the shards in order without decoding pictures; lost ones as in :func:`read_samples`."""
    with closing(Storage()) as storage:

        def read(name: str, shard: str, entry: SampleEntry) -> str:
            (text,) = storage.read(shard, [entry.text])
            return decode_caption(text, entry.text_ext)

        yield from _read_all(read, specs, index_dir, on_lost or _log, None, storage, 1.0)


def _read_all(
    read: Callable[[str, str, SampleEntry], _Read],
    specs: Sequence[str],
    index_dir: Path | None,
    lose: OnLost,
    on_bad: OnLost | None,
    storage: Storage,
    share: float,
) -> Iterator[_Read]:
    shards = expand_shards(specs)
    for shard, label in zip(shards, shard_labels(shards), strict=True):
        try:
            for name, entry in _entries(shard, label, index_dir, lose, storage, share):
                try:
                    sample = read(name, shard, entry)
                except CorruptSample as corrupt:
                    lose(name, str(corrupt))
                    continue
                yield sample
        except CacheUnusable:  # a full disk of ours is no fault of the shard
            raise
        except DataError as error:
            if not isinstance(error, ShardUnavailable):
                storage.forget(shard)
            if on_bad is None:
                raise
            on_bad(label, str(error))


def _entries(
    shard: str, label: str, index_dir: Path | None, lose: OnLost, storage: Storage, share: float
) -> Iterator[tuple[str, SampleEntry]]:
    # Reading writes nothing: a missing index is built for this pass only.
    state = storage.state(shard)
    known = (index_dir is not None or not is_remote(shard)) and index_path(shard, index_dir).exists()
    index = load_index(shard, index_dir, state) if known else build_index(shard, state)
    unusable = [*index.incomplete, *((key, "key comes twice") for key in index.duplicates)]
    for number in np.flatnonzero(held_out(key_hashes(key for key, _ in unusable), share)).tolist():
        key, why = unusable[number]
        lose(f"{label}#{key}", why)
    for number in np.flatnonzero(held_out(index.hashes, share)).tolist():
        entry = index.sample(number)
        yield f"{label}#{entry.key}", entry


def _log(name: str, reason: str) -> None:
    logger.warning("sample %s is lost: %s", name, reason)
