"""One lane: the stream of packed sequences that fills one slot of the global batch.

What a lane yields depends on the data, the seed and the global batch only, and its whole state is one integer, the
position of the next sample in the lane. So any rank or worker can carry any lane on from where another left it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megamoe.data.catalog import ShardSet
from megamoe.data.decode import CorruptSample, decode_caption, decode_image
from megamoe.data.order import SampleOrder
from megamoe.data.pack import PackShape, SequenceBuilder
from megamoe.data.storage import Storage
from megamoe.data.tokenizer import Tokenizer
from megamoe.errors import DataError

MAX_LOST_IN_A_ROW = 1000  # after so many the lane will not find a usable sample by going on


@dataclass(frozen=True)
class LostSample:
    """A sample that could not be used: the lane (slot) it was due in, its id, and why."""

    slot: int
    id: str
    reason: str


@dataclass(frozen=True)
class PackedSequence:
    """A sequence and what went into it. ``cursor`` is the lane's state after it.

    ``pixels`` uint8 (I, H, W, 3), ``text`` int64 (3, L): see :class:`megamoe.data.pack.SequenceBuilder`.
    """

    pixels: npt.NDArray[np.uint8]
    text: npt.NDArray[np.int64]
    samples: list[str]
    lost: list[LostSample]
    truncated: int
    targets: int
    cursor: int


class LanePacker:
    """Packs the sequences of one lane.

    Samples are taken in lane order until one does not fit; it opens the next sequence. A sample that cannot be used is
    recorded as lost and the lane goes on with its own next sample: a rule that holds on every layout, so that one
    corrupt picture does not change what other lanes see.
    """

    def __init__(
        self,
        lane: int,
        *,
        shards: ShardSet,
        storage: Storage,
        order: SampleOrder,
        tokenizer: Tokenizer,
        shape: PackShape,
    ) -> None:
        self.lane = lane
        self._shards = shards
        self._storage = storage
        self._order = order
        self._tokenizer = tokenizer
        self._shape = shape

    def next_sequence(self, cursor: int) -> PackedSequence:
        """The sequence that begins with the lane's sample number ``cursor``.

        Raises:
            DataError: a shard cannot be read, or ``MAX_LOST_IN_A_ROW`` samples in a row could not be used.
        """
        builder = SequenceBuilder(self._shape, self._tokenizer)
        samples: list[str] = []
        lost: list[LostSample] = []
        in_a_row = 0
        while not builder.full:
            _, shard, sample = self._order.locate(self.lane, cursor)
            entry, path = self._shards.index(shard).sample(sample), self._shards.shards[shard]
            name = f"{self._shards.labels[shard]}#{entry.key}"
            try:
                # text first: it is cheap and decides whether the picture is worth decoding now
                text = decode_caption(self._storage.read(path, entry.text_offset, entry.text_size), entry.text_ext)
                caption = self._tokenizer.encode(text)
                if not builder.fits(caption):
                    break
                data = self._storage.read(path, entry.image_offset, entry.image_size)
                pixels = decode_image(data, self._shape.image_size)
            except CorruptSample as corrupt:
                lost.append(LostSample(self.lane, name, str(corrupt)))
                in_a_row += 1
                if in_a_row == MAX_LOST_IN_A_ROW:
                    raise DataError(
                        f"sample {name}: {corrupt}; it is number {in_a_row} in a row that cannot be used, "
                        "look at the shards"
                    ) from corrupt
            else:
                builder.add(pixels, caption)
                samples.append(name)
                in_a_row = 0
            cursor += 1
        return PackedSequence(builder.pixels, builder.text, samples, lost, builder.truncated, builder.targets, cursor)
