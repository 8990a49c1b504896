"""What one decoding process does: pack the next sequence of each of its lanes, step after step."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from megamoe.data.catalog import ShardSet
from megamoe.data.lane import LanePacker, PackedSequence
from megamoe.data.order import SampleOrder
from megamoe.data.pack import PackShape
from megamoe.data.storage import Storage
from megamoe.data.tokenizer import Tokenizer
from megamoe.errors import DataError


@dataclass(frozen=True)
class LaneRow:
    """The next sequence of one lane. ``row`` is its place in the tensors of its item."""

    row: int
    samples: list[str]
    lost: list[tuple[str, str]]
    truncated: int
    targets: int
    cursor: int


@dataclass(frozen=True)
class WorkerItem:
    """One optimizer step of a worker's lanes: pixels uint8 (n, I, H, W, 3), text int64 (n, 3, L)."""

    pixels: Tensor
    text: Tensor
    lanes: dict[int, LaneRow]


@dataclass(frozen=True)
class WorkerError:
    """A :class:`DataError` on its way to the main process: a raised one would come with a traceback in its message."""

    message: str


class LaneStream(IterableDataset[WorkerItem | WorkerError]):
    """Endless steps of the lanes in ``cursors`` (lane -> position to start from).

    In worker w of W it yields every W-th lane from the w-th on, in the main process all of them.
    """

    def __init__(
        self,
        cursors: Mapping[int, int],
        *,
        shards: ShardSet,
        tokenizer: Tokenizer,
        shape: PackShape,
        seed: int,
        global_batch: int,
        shuffle_window: int,
    ) -> None:
        self._cursors = dict(cursors)
        self._shards = shards
        self._tokenizer = tokenizer
        self._shape = shape
        self._order = (seed, global_batch, shuffle_window)

    def __iter__(self) -> Iterator[WorkerItem | WorkerError]:
        info = get_worker_info()
        lanes = sorted(self._cursors)
        if info is not None:
            lanes = lanes[info.id :: info.num_workers]
        cursors = {lane: self._cursors[lane] for lane in lanes}
        order = SampleOrder(self._shards.counts, *self._order)
        storage = Storage()
        packers = [
            LanePacker(
                lane, shards=self._shards, storage=storage, order=order, tokenizer=self._tokenizer, shape=self._shape
            )
            for lane in lanes
        ]
        try:
            while True:
                sequences = [packer.next_sequence(cursors[packer.lane]) for packer in packers]
                cursors = {lane: sequence.cursor for lane, sequence in zip(lanes, sequences, strict=True)}
                yield _item(lanes, sequences)
        except DataError as error:
            if info is None:
                raise
            yield WorkerError(str(error))
        finally:
            storage.close()


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


def _item(lanes: list[int], sequences: list[PackedSequence]) -> WorkerItem:
    rows = {
        lane: LaneRow(
            row,
            sequence.samples,
            [(lost.id, lost.reason) for lost in sequence.lost],
            sequence.truncated,
            sequence.targets,
            sequence.cursor,
        )
        for row, (lane, sequence) in enumerate(zip(lanes, sequences, strict=True))
    }
    pixels = torch.from_numpy(np.stack([sequence.pixels for sequence in sequences]))
    return WorkerItem(pixels, torch.from_numpy(np.stack([sequence.text for sequence in sequences])), rows)
