"""Run one worker process: pack the next sequence of each of its lanes, step after step.

Nothing here imports torch, which would cost each process 1.5 seconds and 150 MB.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from megamoe.core.errors import DataError
from megamoe.data.loader.lane import LanePacker, PackedSequence
from megamoe.data.order.position import DataState
from megamoe.data.order.sample_order import Anchor, SampleOrder
from megamoe.data.remote.cache import ShardCache
from megamoe.data.remote.download import opener
from megamoe.data.sample.pack import PackShape
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.shards.catalog import BadShard, Catalog, DataSet
from megamoe.data.shards.expand import is_remote
from megamoe.data.shards.storage import Storage


@dataclass(frozen=True)
class OrderSettings:
    """The settings that the order of samples depends on, besides the data."""

    seed: int
    global_batch: int
    shuffle_shards: int


class Buffer(NamedTuple):
    """The memory of the n sequences of a step: ``pixels`` uint8 (n, I, H, W, 3), ``text`` int64 (n, 3, L)."""

    pixels: npt.NDArray[np.uint8]
    text: npt.NDArray[np.int64]


@dataclass(frozen=True)
class WorkerItem:
    """One optimizer step of a worker's lanes.

    Attributes:
        buffer: number of the buffer that holds pixels and text, the same for all workers of a step.
        sequences: the contents of each of the worker's rows.
        anchors: by source, the earliest window that these lanes still need after this step.
        counters: by (source, what), see :meth:`megamoe.data.loader.lane.LanePacker.next_sequence`.
        reading: cost of fetching shards, as :attr:`megamoe.data.shards.storage.Storage.counters`, and ``seconds`` in total.
    """

    buffer: int
    sequences: list[PackedSequence]
    anchors: tuple[Anchor, ...]
    counters: Counter[tuple[int, str]]
    reading: Counter[str]


@dataclass(frozen=True)
class WorkerError:
    """A :class:`DataError` on its way to the main process. If it were raised, its message would contain a traceback."""

    error: DataError


def buffers(lanes: int, shape: PackShape, count: int, memory: mmap | None = None) -> list[Buffer]:
    """Return ``count`` buffers for ``lanes`` sequences each: one after the other in ``memory``, or newly allocated."""
    pictures = (lanes, shape.images, shape.image_size, shape.image_size, 3)
    text = (lanes, 3, shape.length)
    if memory is None:
        return [Buffer(np.empty(pictures, np.uint8), np.empty(text, np.int64)) for _ in range(count)]
    each, pixels_end = _sizes(lanes, shape)
    return [
        Buffer(
            np.ndarray(pictures, np.uint8, memory, number * each),
            np.ndarray(text, np.int64, memory, number * each + pixels_end),
        )
        for number in range(count)
    ]


def buffer_bytes(lanes: int, shape: PackShape) -> int:
    """Return the bytes of one of :func:`buffers`."""
    return _sizes(lanes, shape)[0]


def _sizes(lanes: int, shape: PackShape) -> tuple[int, int]:
    """Return the bytes of a buffer, and of its pictures, rounded up to whole cache lines."""
    pixels_end = -(-lanes * shape.images * shape.image_size**2 * 3 // 64) * 64
    return pixels_end + -(-lanes * 3 * shape.length * 8 // 64) * 64, pixels_end


class LaneStream:
    """Produce endless steps of the lanes of ``state``, beginning at its cursors, in its order of lanes.

    Worker w of W has the w-th of W contiguous parts of the lanes. A ring of ``buffers`` buffers is filled in turn, so a
    buffer is overwritten after that many further items. Reuse matters: touching new memory costs a fifth of the time of
    decoding a picture.
    """

    def __init__(
        self,
        state: DataState,
        *,
        data: DataSet,
        cache: ShardCache | None,
        tokenizer: Tokenizer,
        shape: PackShape,
        order: OrderSettings,
        buffers: int,
    ) -> None:
        self._state = state
        self._data = data
        self._cache = cache
        self._tokenizer = tokenizer
        self._shape = shape
        self._order = order
        self._buffers = buffers

    def buffers(self, memory: mmap | None = None) -> list[Buffer]:
        """Return the buffers of all lanes; each worker fills the rows of its own lanes."""
        return buffers(len(self._state.cursors), self._shape, self._buffers, memory)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all buffers together."""
        return self._buffers * buffer_bytes(len(self._state.cursors), self._shape)

    def preload(self) -> None:
        """Import what reading needs, once for all workers that are forked from this process."""
        Image.preinit()
        for source in self._data.sources:
            if is_remote(source.shards[0]):
                opener(source.shards[0])

    def serve(self, worker: int, workers: int, memory: mmap) -> Iterator[WorkerItem | WorkerError]:
        """Yield :meth:`steps` in a worker process; a :class:`DataError` is yielded and not raised."""
        try:
            yield from self.steps(worker, workers, self.buffers(memory))
        except DataError as error:
            yield WorkerError(error if isinstance(error, BadShard) else DataError(str(error)))

    def steps(self, worker: int, workers: int, ring: Sequence[Buffer]) -> Generator[WorkerItem, None, None]:
        """Write step after step into the worker's rows of the buffers of ``ring``, without end.

        Raises:
            DataError: it cannot continue.
        """
        lanes = list(self._state.cursors)
        rows = slice(len(lanes) * worker // workers, len(lanes) * (worker + 1) // workers)
        storage = Storage(self._cache)
        try:
            yield from self._steps(lanes[rows], storage, [Buffer(each.pixels[rows], each.text[rows]) for each in ring])
        finally:
            storage.close()

    def _steps(self, lanes: list[int], storage: Storage, ring: Sequence[Buffer]) -> Iterator[WorkerItem]:
        catalog, sources = Catalog(self._data, storage), self._data.sources
        for number, source in enumerate(sources):
            if all(catalog.label(number, shard) in self._data.quarantine for shard in range(len(source.shards))):
                raise DataError(f"data.train: all shards of source {source.name} are in quarantine; repair them")
        order = SampleOrder(
            [len(source.shards) for source in sources],
            [source.weight for source in sources],
            catalog.count,
            seed=self._order.seed,
            lanes=self._order.global_batch,
            shuffle_shards=self._order.shuffle_shards,
            anchors=self._state.anchors,
            is_read=catalog.is_read,
        )
        packers = [
            LanePacker(lane, catalog=catalog, order=order, tokenizer=self._tokenizer, shape=self._shape) for lane in lanes
        ]
        cursors = [self._state.cursors[lane] for lane in lanes]
        for number, (pixels, text) in itertools.cycle(enumerate(ring)):
            started = time.perf_counter()
            counters: Counter[tuple[int, str]] = Counter()
            sequences = [
                packer.next_sequence(cursor, pixels_IHWC, text_3L, counters)
                for packer, cursor, pixels_IHWC, text_3L in zip(packers, cursors, pixels, text, strict=True)
            ]
            cursors = [sequence.cursor for sequence in sequences]
            first, last = min(zip(cursors, lanes, strict=True)), max(zip(cursors, lanes, strict=True))
            catalog.keep(order.shards_between(first, last))
            order.forget_before(first[1], first[0])
            reading, storage.counters = storage.counters, Counter()
            reading["seconds"] += time.perf_counter() - started  # type: ignore[assignment]
            yield WorkerItem(number, sequences, tuple(order.anchors(first[1], first[0])), counters, reading)
