"""Load the part of each optimizer step that belongs to one data-parallel rank.

The global batch has ``global_batch`` slots, each fed by one lane. With B sequences per micro-batch and D data-parallel
ranks, micro-batch i of rank d holds the lanes ``(i * D + d) * B`` to ``(i * D + d) * B + B - 1``. A lane does not know
which rank carries it, so the global batch of a step is the same, bit for bit, for every D, every B and any number of
workers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.config.data import DataConfig
from megamoe.config.model import VisionConfig
from megamoe.core.errors import DataError, UserError
from megamoe.data.loader.lane import LostSample, PackedSequence
from megamoe.data.loader.processes import WorkerProcesses
from megamoe.data.loader.worker import Buffer, LaneStream, OrderSettings, WorkerError, WorkerItem
from megamoe.data.order.position import DataState, earliest
from megamoe.data.order.sample_order import Anchor
from megamoe.data.remote.cache import ShardCache
from megamoe.data.sample.pack import PackShape
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.shards.catalog import DataSet, learnt_count


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step of one rank.

    Attributes:
        micro_batches: pairs of pixels uint8 (B, I, H, W, 3) and text int64 (B, 3, L), in the order to run them. Their
            memory is overwritten when the step after the next one is requested.
        samples: (slot, sample id) of each sample in them, in that order.
        lost: samples that could not be used and were replaced by the next of their lane.
        truncated: captions that were cut to fit an empty sequence.
        targets: labels to predict on this rank in this step.
        counters: by (source, what), see :meth:`megamoe.data.loader.lane.LanePacker.next_sequence`.
        reading: cost of reading, as in :class:`megamoe.data.loader.worker.WorkerItem`, over all workers.
        wait_seconds: time that the caller waited for this step.
    """

    micro_batches: list[tuple[Tensor, Tensor]]
    samples: list[tuple[int, str]]
    lost: list[LostSample]
    truncated: int
    targets: int
    counters: Counter[tuple[int, str]]
    reading: Counter[str]
    wait_seconds: float


class StepLoader(Iterator[StepBatch]):
    """Iterate over optimizer steps without end. Close it, or use it in a ``with`` statement.

    Args:
        data: section ``data`` of the config.
        vision: section ``model.vision``.
        tokenizer: the text vocabulary.
        dataset: the training shards.
        cache: where shards that are not local files are kept on this node.
        seed: seed of the order.
        global_batch: sequences of an optimizer step over all ranks.
        micro_batch: sequences of one forward pass of this rank.
        dp_rank: this rank among the data-parallel ranks.
        dp_size: number of data-parallel ranks.

    Raises:
        UserError: the global batch is not a whole number of micro-batches on each rank.
        BadShard: while iterating: a shard cannot be used. The state is that before the step; call :meth:`quarantine` to
            continue without the shard.
        DataError: while iterating: too many samples in a row are corrupt.
        WorkerDied: while iterating: a worker process died.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        vision: VisionConfig,
        tokenizer: Tokenizer,
        dataset: DataSet,
        seed: int,
        global_batch: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        cache: ShardCache | None = None,
    ) -> None:
        assert 0 <= dp_rank < dp_size
        if global_batch % (micro_batch * dp_size):
            raise UserError(
                f"train.global_batch {global_batch}: not a multiple of train.micro_batch {micro_batch} x {dp_size} "
                "data-parallel ranks; change one of them"
            )
        rounds = range(global_batch // (micro_batch * dp_size))
        firsts = [(i * dp_size + dp_rank) * micro_batch for i in rounds]
        lanes = [lane for first in firsts for lane in range(first, first + micro_batch)]
        self._micro_batch = micro_batch
        anchors = tuple(Anchor(0, 0) for _ in dataset.sources)
        self._state = DataState(dict.fromkeys(lanes, 0), anchors, dict(dataset.quarantine))
        self._workers = min(data.workers, len(lanes))
        self._prefetch = data.prefetch
        self._dataset = dataset
        self._cache = cache
        self._make_stream = partial(
            LaneStream,
            buffers=data.prefetch + 3,  # the items a worker has ready, the one in the making, and two that the caller holds
            cache=cache,
            tokenizer=tokenizer,
            shape=PackShape(data.sequence_length, data.images_per_sequence, vision.image_size, vision.patches),
            order=OrderSettings(seed, global_batch, data.shuffle_shards),
        )
        self._global_batch = global_batch
        self._running: _InProcess | _InWorkers | None = None

    def __next__(self) -> StepBatch:
        start = time.perf_counter()
        if self._running is None:
            stream = self._make_stream(self._state, data=self._dataset.with_quarantine(self._state.quarantine))
            self._running = _InWorkers(stream, self._workers, self._prefetch) if self._workers else _InProcess(stream)
        try:
            parts = self._running.next_step()
        except BaseException:
            self.close()
            raise
        return self._assemble(parts, start)

    @property
    def state(self) -> DataState:
        """The state of this rank's lanes after the steps handed out so far; its anchors are those of these lanes."""
        return self._state

    def go_on_from(self, state: DataState) -> None:
        """Resume from ``state``, which holds all lanes, whichever ranks carried them; this rank takes its own.

        Raises:
            DataError: it does not hold exactly ``global_batch`` lanes.
        """
        if sorted(state.cursors) != list(range(self._global_batch)):
            raise DataError(
                f"data state: holds {len(state.cursors)} lanes, but train.global_batch is {self._global_batch}; "
                "resume with the global batch that the checkpoint was made with"
            )
        self._restart(replace(state, cursors={lane: state.cursors[lane] for lane in self._state.cursors}))

    def quarantine(self, state: DataState, shards: Mapping[str, int]) -> None:
        """Resume from ``state``, an earlier one of this loader, without ``shards``: name -> samples it counts for."""
        self._restart(replace(state, quarantine={**state.quarantine, **shards}))

    def count(self, shard: str, fetch: bool) -> int:
        """Return how many samples of ``shard`` training reads; -1 if that is unknown. ``fetch`` may download the shard."""
        return learnt_count(self._dataset, shard, self._cache, fetch)

    def _restart(self, state: DataState) -> None:
        self.close()
        self._state = state

    def close(self) -> None:
        """End the workers and discard what they prepared. The state is that of the last step handed out."""
        running, self._running = self._running, None
        if running is not None:
            running.close()

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _assemble(self, parts: _Parts, start: float) -> StepBatch:
        sequences: list[PackedSequence] = [sequence for item in parts.items for sequence in item.sequences]
        lanes = list(self._state.cursors)
        by_lane = list(zip(lanes, sequences, strict=True))  # workers have contiguous parts of the lanes, in order
        cursors = {lane: sequence.cursor for lane, sequence in by_lane}
        anchors = earliest(item.anchors for item in parts.items)
        self._state = replace(self._state, cursors=cursors, anchors=anchors)
        return StepBatch(
            list(zip(parts.pixels.split(self._micro_batch), parts.text.split(self._micro_batch), strict=True)),
            samples=[(lane, name) for lane, sequence in by_lane for name in sequence.samples],
            lost=[lost for sequence in sequences for lost in sequence.lost],
            truncated=sum(sequence.truncated for sequence in sequences),
            targets=sum(sequence.targets for sequence in sequences),
            counters=sum((item.counters for item in parts.items), Counter()),
            reading=sum((item.reading for item in parts.items), Counter()),
            wait_seconds=time.perf_counter() - start,
        )


class _Parts(NamedTuple):
    """A step: each worker's item, and the pixels uint8 (n, I, H, W, 3) and text int64 (n, 3, L) of all lanes."""

    items: list[WorkerItem]
    pixels: Tensor
    text: Tensor


class _InProcess:
    """Run the stream in this process."""

    def __init__(self, stream: LaneStream) -> None:
        ring = stream.buffers()
        self._tensors = _tensors(ring)
        self._items = stream.steps(0, 1, ring)

    def next_step(self) -> _Parts:
        item = next(self._items)
        return _Parts([item], *self._tensors[item.buffer])

    def close(self) -> None:
        self._items.close()


class _InWorkers:
    """Run the stream in worker processes, which fill the same tensors in shared memory, each its own rows."""

    def __init__(self, stream: LaneStream, workers: int, ahead: int) -> None:
        self._workers = range(workers)
        self._processes = WorkerProcesses(stream, workers, stream.buffer_bytes, ahead)
        self._tensors = _tensors(stream.buffers(self._processes.memory))

    @property
    def pids(self) -> list[int]:
        return self._processes.pids

    def next_step(self) -> _Parts:
        items = [self._receive(worker) for worker in self._workers]
        (buffer,) = {item.buffer for item in items}
        return _Parts(items, *self._tensors[buffer])

    def _receive(self, worker: int) -> WorkerItem:
        item = self._processes.receive(worker)
        if isinstance(item, WorkerError):
            raise item.error
        assert isinstance(item, WorkerItem)
        return item

    def close(self) -> None:
        self._processes.close()


def _tensors(ring: list[Buffer]) -> list[tuple[Tensor, Tensor]]:
    """Return the buffers as tensors over the same memory."""
    return [(torch.from_numpy(buffer.pixels), torch.from_numpy(buffer.text)) for buffer in ring]
