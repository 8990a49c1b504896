"""Pack one lane: the stream of sequences that fills one slot of the global batch.

What a lane yields depends only on the data, the seed and the global batch. Its whole state is one integer, the position
of its next sample. So any rank or worker can resume any lane where another stopped.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megamoe.core.errors import DataError
from megamoe.data.order.sample_order import SampleOrder
from megamoe.data.sample.decode import CorruptSample, decode_caption, decode_image
from megamoe.data.sample.pack import PackShape, SequenceBuilder
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.shards.catalog import Catalog, InQuarantine, Located

MAX_LOST_IN_A_ROW = 1000  # after so many, the shards are at fault and not single samples


@dataclass(frozen=True)
class LostSample:
    """A sample that could not be used: the lane (slot) it was due in, its id, and why."""

    slot: int
    id: str
    reason: str


@dataclass(frozen=True)
class PackedSequence:
    """The contents of one packed sequence. ``cursor`` is the lane's state after it."""

    samples: list[str]
    lost: list[LostSample]
    truncated: int
    targets: int
    cursor: int


class _Ready(NamedTuple):
    """A sample that is ready to be packed, except that its picture is not decoded yet."""

    cursor: int
    image: memoryview
    size: int
    caption: list[int]


class LanePacker:
    """Pack the sequences of one lane.

    Samples are taken in lane order until one does not fit; that one opens the next sequence. A sample that cannot be used
    is recorded as lost, and the lane takes its own next sample. This rule is the same on every layout, so one corrupt
    picture does not change what other lanes see.
    """

    def __init__(self, lane: int, *, catalog: Catalog, order: SampleOrder, tokenizer: Tokenizer, shape: PackShape) -> None:
        self.lane = lane
        self._catalog = catalog
        self._order = order
        self._tokenizer = tokenizer
        self._shape = shape
        self._waiting: _Ready | None = None  # did not fit; opens the next sequence

    def next_sequence(
        self,
        cursor: int,
        pixels: npt.NDArray[np.uint8],
        tokens: npt.NDArray[np.int64],
        counters: Counter[tuple[int, str]],
    ) -> PackedSequence:
        """Fill one sequence, beginning with the lane's sample number ``cursor``.

        Args:
            cursor: the lane's state.
            pixels: uint8 (I, H, W, 3), filled; see :class:`megamoe.data.sample.pack.SequenceBuilder`.
            tokens: int64 (3, L), filled.
            counters: increased, by (source, what): ``samples``, ``bytes`` of their members, ``decode_seconds``, and
                ``lost_image``, ``lost_caption``, ``lost_incomplete``, ``lost_shard`` by cause.

        Raises:
            BadShard: a shard cannot be used.
            DataError: ``MAX_LOST_IN_A_ROW`` samples in a row could not be used.
        """
        builder = SequenceBuilder(self._shape, self._tokenizer, pixels, tokens)
        samples: list[str] = []
        lost: list[LostSample] = []
        in_a_row = 0
        while not builder.full:
            ref = self._order.locate(self.lane, cursor)
            source, located = ref.source, None
            try:
                located = self._catalog.sample(source, ref.shard, ref.sample)
                ready = self._ready(cursor, located)
                # Text first: it is cheap, and it decides whether the picture is needed now.
                if not builder.fits(ready.caption):
                    self._waiting = ready
                    break
                started = time.perf_counter()
                decode_image(ready.image, self._shape.image_size, out=builder.next_picture)
                counters[source, "decode_seconds"] += time.perf_counter() - started  # type: ignore[assignment]
            except CorruptSample as corrupt:
                name = located.id if located else f"{self._catalog.label(source, ref.shard)}#sample {ref.sample}"
                lost.append(LostSample(self.lane, name, str(corrupt)))
                counters[source, f"lost_{str(corrupt).partition(':')[0]}"] += 1
                # Quarantined samples come in long runs, and others follow.
                in_a_row += not isinstance(corrupt, InQuarantine)
                if in_a_row == MAX_LOST_IN_A_ROW:
                    raise DataError(
                        f"sample {name}: {corrupt}; {in_a_row} samples in a row cannot be used; check the shards"
                    ) from corrupt
            else:
                builder.add(ready.caption)
                samples.append(located.id)
                counters[source, "samples"] += 1
                counters[source, "bytes"] += ready.size
                in_a_row = 0
            if located:
                for name, why in located.lost:
                    lost.append(LostSample(self.lane, name, why))
                    counters[source, "lost_incomplete"] += 1
            cursor += 1
        builder.finish()
        return PackedSequence(samples, lost, builder.truncated, builder.targets, cursor)

    def _ready(self, cursor: int, located: Located) -> _Ready:
        """Return sample number ``cursor`` of the lane, read now or when it did not fit into the previous sequence.

        Raises:
            CorruptSample: its caption cannot be used.
        """
        if self._waiting is not None and self._waiting.cursor == cursor:
            return self._waiting
        image, text = self._catalog.read(located)
        caption = self._tokenizer.encode(decode_caption(text, located.entry.text_ext))
        return _Ready(cursor, image, len(image) + len(text), caption)
