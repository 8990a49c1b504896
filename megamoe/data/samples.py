"""Shards read front to back, sample by sample: what evaluation and the data tools need."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megamoe.data.cache import ShardCache
from megamoe.data.decode import CorruptSample, decode_caption, decode_image
from megamoe.data.index import SampleEntry, build_index, index_path, load_index
from megamoe.data.shards import expand_shards, is_remote, shard_labels
from megamoe.data.split import held_out, key_hash
from megamoe.data.storage import Storage

logger = logging.getLogger(__name__)
OnLost = Callable[[str, str], None]


@dataclass(frozen=True)
class Sample:
    """A decoded sample: ``<shard>#<key>``, uint8 (H, W, 3), text."""

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
    cache: ShardCache | None = None,
    share: float = 1.0,
) -> Iterator[Sample]:
    """Yield the samples of the shards in their order, at most ``limit``, pictures resized to ``image_size``.

    Shards that are not local files are read from ``cache``. With a ``share`` below 1, only the samples that a run with
    this ``data.held_out`` never trains on are read.

    ``on_lost(id, reason)`` is called for each sample that cannot be used, incomplete ones and second ones of a key
    included; without it each is logged as a warning.
    """
    given = 0
    storage = Storage(cache)
    lose = on_lost or _log
    with closing(storage):
        for name, path, entry in _entries(specs, index_dir, lose, storage, share):
            if limit is not None and given >= limit:
                return
            try:
                image, text = storage.read(path, (entry.image, entry.text))
                caption = decode_caption(text, entry.text_ext)
                sample = Sample(name, decode_image(image, image_size), caption)
            except CorruptSample as corrupt:
                lose(name, str(corrupt))
                continue
            given += 1
            yield sample


def read_captions(specs: Sequence[str], index_dir: Path | None = None, on_lost: OnLost | None = None) -> Iterator[str]:
    """Yield the captions of the shards in order, no picture decoded; lost ones as in :func:`read_samples`."""
    storage = Storage()
    lose = on_lost or _log
    with closing(storage):
        for name, path, entry in _entries(specs, index_dir, lose, storage):
            try:
                (text,) = storage.read(path, [entry.text])
                caption = decode_caption(text, entry.text_ext)
            except CorruptSample as corrupt:
                lose(name, str(corrupt))
                continue
            yield caption


def _entries(
    specs: Sequence[str], index_dir: Path | None, lose: OnLost, storage: Storage, share: float = 1.0
) -> Iterator[tuple[str, str, SampleEntry]]:
    shards = expand_shards(specs)
    for shard, label in zip(shards, shard_labels(shards), strict=True):
        # reading writes nothing: where there is no index it is made for this pass only
        state = storage.state(shard)
        known = (index_dir is not None or not is_remote(shard)) and index_path(shard, index_dir).exists()
        index = load_index(shard, index_dir, state) if known else build_index(shard, state)
        for key, why in [*index.incomplete, *((key, "key comes twice") for key in index.duplicates)]:
            if _is_read(key, share):
                lose(f"{label}#{key}", why)
        for i in range(index.samples):
            entry = index.sample(i)
            if _is_read(entry.key, share):
                yield f"{label}#{entry.key}", shard, entry


def _is_read(key: str, share: float) -> bool:
    return share == 1.0 or bool(held_out(np.array([key_hash(key)], dtype=np.uint64), share)[0])


def _log(name: str, reason: str) -> None:
    logger.warning("sample %s was left out: %s", name, reason)
