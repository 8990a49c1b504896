"""What one decoding process does: pack the next sequence of each of its lanes, step after step."""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from megamoe.data.cache import ShardCache
from megamoe.data.catalog import BadShard, Catalog, DataSet
from megamoe.data.lane import LanePacker, PackedSequence
from megamoe.data.order import Anchor, SampleOrder
from megamoe.data.pack import PackShape
from megamoe.data.state import DataState
from megamoe.data.storage import Storage
from megamoe.data.tokenizer import Tokenizer
from megamoe.errors import DataError


@dataclass(frozen=True)
class OrderSettings:
    """What the order of samples depends on, beside the data."""

    seed: int
    global_batch: int
    shuffle_shards: int


@dataclass(frozen=True)
class WorkerItem:
    """One optimizer step of a worker's lanes.

    Attributes:
        pixels: uint8 (n, I, H, W, 3).
        text: int64 (n, 3, L).
        lanes: lane of each of the n rows.
        sequences: what each row holds.
        anchors: by source, the earliest window that these lanes still need after this step.
        counters: what bringing shards took, as :attr:`megamoe.data.storage.Storage.counters`, and ``seconds`` in all.
    """

    pixels: Tensor
    text: Tensor
    lanes: list[int]
    sequences: list[PackedSequence]
    anchors: tuple[Anchor, ...]
    counters: Counter[str]


@dataclass(frozen=True)
class WorkerError:
    """A :class:`DataError` on its way to the main process: a raised one would come with a traceback in its message."""

    error: DataError


class LaneStream(IterableDataset[WorkerItem | WorkerError]):
    """Endless steps of the lanes of ``state``, from where it says, in its order of lanes.

    In worker w of W it yields the w-th of W contiguous parts of the lanes, in the main process all of them. The tensors of
    an item are written over when ``buffers`` more items have been asked for: memory that is touched for the first time
    costs a fifth of what decoding a picture costs.
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

    def __iter__(self) -> Iterator[WorkerItem | WorkerError]:
        info = get_worker_info()
        lanes = list(self._state.cursors)
        if info is not None:
            lanes = lanes[len(lanes) * info.id // info.num_workers : len(lanes) * (info.id + 1) // info.num_workers]
        storage = Storage(self._cache)
        try:
            yield from self._steps(lanes, storage, shared=info is not None)
        except DataError as error:
            if info is None:
                raise
            yield WorkerError(error if isinstance(error, BadShard) else DataError(str(error)))
        finally:
            storage.close()

    def _steps(self, lanes: list[int], storage: Storage, shared: bool) -> Iterator[WorkerItem]:
        catalog, sources = Catalog(self._data, storage), self._data.sources
        for number, source in enumerate(sources):
            if all(catalog.label(number, shard) in self._data.quarantine for shard in range(len(source.shards))):
                raise DataError(f"data.train: all shards of source {source.name} are in quarantine; mend them")
        order = SampleOrder(
            [len(source.shards) for source in sources],
            [source.weight for source in sources],
            catalog.count,
            seed=self._order.seed,
            lanes=self._order.global_batch,
            shuffle_shards=self._order.shuffle_shards,
            anchors=self._state.anchors,
        )
        packers = [
            LanePacker(lane, catalog=catalog, order=order, tokenizer=self._tokenizer, shape=self._shape) for lane in lanes
        ]
        cursors = [self._state.cursors[lane] for lane in lanes]
        shape = self._shape
        pictures = (len(lanes), shape.images, shape.image_size, shape.image_size, 3)
        ring = [
            (_empty(pictures, torch.uint8, shared), _empty((len(lanes), 3, shape.length), torch.int64, shared))
            for _ in range(self._buffers)
        ]
        for pixels, text in itertools.cycle(ring):
            started = time.perf_counter()
            sequences = [
                packer.next_sequence(cursor, pixels_IHWC, text_3L)
                for packer, cursor, pixels_IHWC, text_3L in zip(packers, cursors, pixels.numpy(), text.numpy(), strict=True)
            ]
            cursors = [sequence.cursor for sequence in sequences]
            cursor, lane = min(zip(cursors, lanes, strict=True))
            counters, storage.counters = storage.counters, Counter()
            counters["seconds"] += time.perf_counter() - started  # type: ignore[assignment]
            yield WorkerItem(pixels, text, lanes, sequences, tuple(order.anchors(lane, cursor)), counters)


def start_worker(_: int) -> None:
    """Set a new worker up: one thread, and deaf to signals that are meant for the training process.

    Ctrl-C and the signals of a batch system reach every process of a job. The training process then finishes its step
    and saves, for which it needs what the workers hold ready; they end when it closes them, or with it, even if it is
    killed.
    """
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _end_with_parent() -> None:
    """Torch's own watch looks at the parent's process id, but that is the fork server, which lives as long as we do."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, shared: bool) -> Tensor:
    """A tensor to be filled. In shared memory from the start, it goes to the training process without a copy."""
    if not shared:
        return torch.empty(shape, dtype=dtype)
    count = torch.Size(shape).numel()
    # what torch's own default_collate does; there is no public way to allocate there without a copy
    storage = torch.UntypedStorage._new_shared(count * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, 0, (count,), (1,)).view(shape)
