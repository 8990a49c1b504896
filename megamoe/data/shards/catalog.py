"""Learn the shards of a data set one by one as they are first needed, name their samples, and fingerprint the set."""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import resource
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megamoe.core.errors import DataError
from megamoe.core.urls import unsigned
from megamoe.data.remote.cache import CacheUnusable, ShardCache
from megamoe.data.remote.download import ShardUnavailable
from megamoe.data.sample.decode import CorruptSample
from megamoe.data.shards.expand import is_remote
from megamoe.data.shards.held_out import held_out, key_hashes
from megamoe.data.shards.index import SampleEntry, ShardIndex, learn_index, read_index
from megamoe.data.shards.labels import ShardLabels
from megamoe.data.shards.storage import MOST_FILES, Storage

_KEPT = 128  # shards and indexes kept open even if fewer are in use, for the next windows
_PLACES = 4096  # shard names and labels cached
_SIZED = 10_000  # up to so many local shards, their sizes are in the fingerprint; more would slow the start

Quarantine = Mapping[str, int]


class BadShard(DataError):
    """A shard that cannot be used now: unavailable, damaged, or not the one that was indexed.

    Attributes:
        shard: its name in sample ids, which contains no secret and does not change when the data moves.
        count: number of its samples, -1 if unknown.
    """

    def __init__(self, message: str, shard: str, count: int) -> None:
        super().__init__(message)
        self.shard, self.count = shard, count

    def __reduce__(self) -> tuple[type[BadShard], tuple[str, str, int]]:
        return BadShard, (str(self), self.shard, self.count)


class InQuarantine(CorruptSample):
    """The sample's shard is quarantined."""


@dataclass(frozen=True)
class Source:
    """Shards that are mixed with those of other sources; ``weight`` is this source's share of the samples read."""

    name: str
    shards: Sequence[str]
    weight: float = 1.0


class Located(NamedTuple):
    """A sample: its id ``<shard>#<key>``, its shard, and where its members lie in the tar.

    ``lost``: samples of the shard that are never read, to be counted as lost along with this one: (id, why). They lack a
    picture or a caption, or repeat a key. They are spread evenly over the samples that are read, so that at any time
    their share is that of the shards read so far.
    """

    id: str
    shard: str
    entry: SampleEntry
    lost: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class DataSet:
    """All sources of a run and how they are read. Small: O(shards), since no sample is known yet.

    Attributes:
        sources: at least one.
        index_dir: folder of the indexes that do not lie beside their shards; new ones are written there.
        held_out: share of the samples, chosen by their keys, that training never sees.
        quarantine: shards that are no longer read, by their names in sample ids, and the number of samples that each one
            counts for in the order.
    """

    sources: Sequence[Source]
    index_dir: Path | None = None
    held_out: float = 0.0
    quarantine: Quarantine = field(default_factory=dict)
    labels: ShardLabels = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", ShardLabels(*(source.shards for source in self.sources)))

    def label(self, source: int, shard: int) -> str:
        """Return a shard's name in sample ids: see :class:`megamoe.data.shards.labels.ShardLabels`."""
        return self.labels(self.sources[source].shards[shard])

    def with_quarantine(self, quarantine: Quarantine) -> DataSet:
        """Return the same data set with this quarantine. Labels are shared: computing many takes half a second."""
        other = copy.copy(self)
        object.__setattr__(other, "quarantine", quarantine)
        return other

    def find(self, label: str) -> tuple[int, int]:
        """Return source and number of the shard with this name in sample ids; raise KeyError if there is none."""
        for source, each in enumerate(self.sources):
            for number, shard in enumerate(each.shards):
                if self.labels(shard) == label:
                    return source, number
        raise KeyError(label)


@dataclass(frozen=True)
class _Known:
    index: ShardIndex
    trained: npt.NDArray[np.int64] | None  # numbers of the samples that are not held out; None: all
    lost: list[tuple[str, str]]  # keys of the samples that cannot be used, and why

    @property
    def samples(self) -> int:
        return self.index.samples if self.trained is None else len(self.trained)

    def number(self, sample: int) -> int:
        """Return the number in the index of the ``sample``-th sample that is not held out."""
        return sample if self.trained is None else int(self.trained[sample])


class Catalog:
    """What one process knows of the shards it has touched. Do not send it to another process."""

    def __init__(self, data: DataSet, storage: Storage) -> None:
        self._data = data
        self._storage = storage
        self._loaded: OrderedDict[str, _Known] = OrderedDict()
        self._places: dict[tuple[int, int], tuple[str, str]] = {}
        self.keep(0)

    def keep(self, shards: int) -> None:
        """Keep this many shards and their indexes open, as far as the limit of open files allows.

        An index is a view of its file. The pages of both belong to the system, which shares them among all processes.
        """
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        files = MOST_FILES if files == resource.RLIM_INFINITY else files
        # Two files each, and half of the limit for others.
        self._limit = self._storage.limit = max(1, min(max(shards, _KEPT), files // 4))

    def label(self, source: int, shard: int) -> str:
        """Return the shard's name in sample ids: see :class:`megamoe.data.shards.labels.ShardLabels`."""
        return self._place(source, shard)[1]

    def count(self, source: int, shard: int) -> int:
        """Return the number of samples of a shard that training reads. The first call learns its index.

        Raises:
            BadShard: it cannot be used, and is not quarantined.
        """
        name, label = self._place(source, shard)
        if label in self._data.quarantine:
            return self._data.quarantine[label]
        return self._index(name).samples

    def is_read(self, source: int, shard: int) -> bool:
        """Return whether a shard is read, that is, not quarantined."""
        return self._place(source, shard)[1] not in self._data.quarantine

    def sample(self, source: int, shard: int, sample: int) -> Located:
        """Return sample number ``sample`` of those that :meth:`count` counts.

        Raises:
            InQuarantine: its shard is quarantined.
            BadShard: its shard cannot be used.
        """
        name, label = self._place(source, shard)
        if label in self._data.quarantine:
            raise InQuarantine("shard: in quarantine")
        known = self._index(name)
        entry = known.index.sample(known.number(sample))
        return Located(f"{label}#{entry.key}", name, entry, _lost(known, label, sample))

    def read(self, located: Located) -> tuple[memoryview, memoryview]:
        """Return the bytes of the picture and of the caption of a located sample.

        Raises:
            BadShard: the shard cannot be read, or is not what was indexed.
        """
        try:
            image, text = self._storage.read(located.shard, (located.entry.image, located.entry.text))
            return image, text
        except CacheUnusable:  # a full disk of ours is no fault of the shard
            raise
        except DataError as error:
            raise self._bad(located.shard, error) from error

    def read_all(self, source: int, shard: int, sample: int) -> tuple[str, dict[str, bytes], Sequence[tuple[str, str]]]:
        """Return the key of a sample, the bytes of all its members by extension, and its ``lost`` as in :class:`Located`.

        The sample is numbered as in :meth:`sample`; the members keep their order in the tar.

        Raises:
            InQuarantine: its shard is quarantined.
            BadShard: its shard cannot be used.
        """
        name, label = self._place(source, shard)
        if label in self._data.quarantine:
            raise InQuarantine("shard: in quarantine")
        known = self._index(name)
        number = known.number(sample)
        extents = known.index.members(number)
        try:
            contents = self._storage.read(name, list(extents.values()))
        except CacheUnusable:
            raise
        except DataError as error:
            raise self._bad(name, error) from error
        members = {ext: bytes(content) for ext, content in zip(extents, contents, strict=True)}
        return known.index.key(number), members, _lost(known, label, sample)

    def _place(self, source: int, shard: int) -> tuple[str, str]:
        """Return name and label of a shard from a cache; unpacking them from all names takes long."""
        place = self._places.get((source, shard))
        if place is None:
            if len(self._places) >= _PLACES:
                self._places.clear()
            name = self._data.sources[source].shards[shard]
            place = self._places[source, shard] = (name, self._data.labels(name))
        return place

    def _index(self, shard: str) -> _Known:
        if shard in self._loaded:
            self._loaded.move_to_end(shard)
            return self._loaded[shard]
        try:
            try:
                index = learn_index(shard, self._data.index_dir, self._storage.state(shard))
            except DataError:
                if not self._storage.renew(shard):  # the copy in the cache may be older than the index
                    raise
                index = learn_index(shard, self._data.index_dir, self._storage.state(shard))
        except CacheUnusable:
            raise
        except DataError as error:
            raise self._bad(shard, error) from error
        known = self._loaded[shard] = _known(index, self._data.held_out)
        while len(self._loaded) > self._limit:
            self._loaded.popitem(last=False)
        return known

    def _bad(self, shard: str, error: DataError) -> BadShard:
        if not isinstance(error, ShardUnavailable):
            self._storage.forget(shard)  # an HTML page in place of a tar must not stay in the cache
        label = self._data.labels(shard)
        return BadShard(str(error), label, self._loaded[shard].samples if shard in self._loaded else -1)


def _lost(known: _Known, label: str, sample: int) -> Sequence[tuple[str, str]]:
    if not known.lost:
        return ()
    first, last = (n * len(known.lost) // known.samples for n in (sample, sample + 1))
    return [(f"{label}#{key}", f"incomplete: {why}") for key, why in known.lost[first:last]]


def learnt_count(data: DataSet, shard: str, cache: ShardCache | None, fetch: bool) -> int:
    """Return :meth:`Catalog.count` of ``shard`` (its name in sample ids) from its index, whatever the shard is like now.

    Without an index, ``fetch`` reads the shard itself. Returns -1 if the count stays unknown.
    """
    with closing(Storage(cache)) as storage:
        catalog = Catalog(data.with_quarantine({}), storage)
        source, number = data.find(shard)
        try:
            return _known(read_index(data.sources[source].shards[number], data.index_dir), data.held_out).samples
        except DataError:
            if not fetch:
                return -1
        try:
            return catalog.count(source, number)
        except DataError:
            return -1


def _known(index: ShardIndex, share: float) -> _Known:
    lost = [*index.incomplete, *((key, "its key comes twice") for key in index.duplicates)]
    if not share:
        return _Known(index, None, lost)
    trained = np.flatnonzero(~held_out(index.hashes, share))
    others = ~held_out(key_hashes(key for key, _ in lost), share)
    return _Known(index, trained, [each for each, is_ours in zip(lost, others, strict=True) if is_ours])


def data_fingerprint(data: DataSet) -> str:
    """Return 16 hex digits over names, weights and, for up to 10,000 local shards, sizes, in their order.

    Two runs with equal fingerprints, seeds and global batches read the same samples in the same order, unless a shard was
    replaced by another of the same name; that is detected from its index when it is read. Folders and URL signatures are
    not part of the fingerprint: data may move, and URLs may be signed again.
    """
    digest = hashlib.sha256(f"{data.held_out}\n".encode())
    local = sum(not is_remote(shard) for source in data.sources for shard in source.shards)
    sized = 0 < local <= _SIZED
    for source in data.sources:
        digest.update(f"{source.weight if len(data.sources) > 1 else 1.0}\n".encode())
        lines = (
            f"{unsigned(shard).rpartition('/')[2]}\0{os.stat(shard).st_size if sized and not is_remote(shard) else ''}\n"
            for shard in source.shards
        )
        while some := "".join(itertools.islice(lines, 1024)):
            digest.update(os.fsencode(some))
    return digest.hexdigest()[:16]
