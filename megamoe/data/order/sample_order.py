"""Compute which sample comes when, from (samples per shard, seed, weights, lanes) alone: no files, no ranks.

Everything is laid out on one endless line of positions. Lane l of G takes the positions ``k * G + l``, k = 0, 1, 2, ...
A lane is one sequence of the global batch, so G is the global batch and ranks do not enter. Two steps lead from a
position to a sample:

1. *Mixture.* With several sources, each block of ``BLOCK`` positions holds each source as often as its weight says, in
   shuffled order. That makes position q of the line position p of one source.
2. *Source.* Epoch after epoch a source permutes its shards and cuts them into windows of ``shuffle_shards`` shards; the
   samples of a window are permuted. Every sample comes exactly once per epoch, and a reader touches only the shards of
   one window at a time.

The samples of a window are counted when the first position after its beginning is needed, in order. So shards that
nothing has read yet need not be counted. To start in the middle, an :class:`Anchor` gives the position at which one
window begins; nothing before it is ever needed.

No permutation is ever stored: :func:`shuffled` computes where one index goes (a Feistel network, Luby and Rackoff 1988,
cycle-walked until it lands in range, Black and Rogaway 2002). So memory does not grow with the samples, and starting in
the middle costs no more than at the beginning. The arithmetic is our own, on integers, keyed by the raw output of Philox
(Salmon et al., SC'11), which NumPy promises to keep unchanged. So a run finds the same order after any upgrade.
"""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megamoe.core.errors import DataError

BLOCK = 1 << 14  # positions after which each source has exactly its share
_PART = 128  # positions of a block that are counted one by one
_MOST_SOURCES = 256
_FORGOTTEN = 256  # windows that are forgotten at a time
_WORD = (1 << 64) - 1
_SHARDS, _WINDOW, _MIXTURE = 0, 1, 2  # families of permutations, whose random streams must differ
_HALF = 7  # bits
_HALVES = [each.astype(np.uint16) for each in divmod(np.arange(BLOCK), 1 << _HALF)]  # of each place in a block
_ROUNDS = 6  # even, so that both halves end in their own places

Count = Callable[[int, int], int]
IsRead = Callable[[int, int], bool]


class SampleRef(NamedTuple):
    """One sample in one epoch: ``shard`` is an index into the source's shards, ``sample`` into the shard's samples."""

    source: int
    epoch: int
    shard: int
    sample: int


class Anchor(NamedTuple):
    """Where a window begins: window number ``window`` of a source, over all epochs, begins at its position ``start``."""

    window: int
    start: int


class SampleOrder:
    """The global order of samples.

    Args:
        shards: number of shards of each source.
        weights: share of each source in the samples read; need not add up to 1.
        count: ``count(source, shard)`` returns the shard's samples; called once per window, may open an index.
        seed: seed of the run.
        lanes: sequences of the global batch (G).
        shuffle_shards: window size: shards whose samples are shuffled together.
        anchors: where each source starts; default the beginning.
        is_read: ``is_read(source, shard)`` is False for a quarantined shard, whose samples only keep their places;
            default: all shards are read.

    Memory does not grow with shards or samples, only by one number per window passed: see :meth:`forget_before`.

    Raises:
        DataError: more than 256 sources; from :meth:`locate`: all shards of a source are empty or not read.
    """

    def __init__(
        self,
        shards: Sequence[int],
        weights: Sequence[float],
        count: Count,
        *,
        seed: int,
        lanes: int,
        shuffle_shards: int,
        anchors: Sequence[Anchor] | None = None,
        is_read: IsRead | None = None,
    ) -> None:
        assert len(shards) == len(weights) > 0 and min(shards) > 0 and lanes > 0 and seed >= 0
        if len(shards) > _MOST_SOURCES:
            raise DataError(f"data.train: {len(shards)} sources; at most {_MOST_SOURCES}, join those of equal weight")
        self.lanes = lanes
        self._mixture = _Mixture(weights, seed)
        starts = anchors or [Anchor(0, 0)] * len(shards)
        self._sources = [
            _SourceOrder(number, shards[number], count, seed, shuffle_shards, starts[number], is_read or (lambda *_: True))
            for number in range(len(shards))
        ]

    def locate(self, lane: int, k: int) -> SampleRef:
        """Return the ``k``-th sample of ``lane``."""
        source, position = self._mixture.locate(k * self.lanes + lane)
        return self._sources[source].locate(position)

    def anchors(self, lane: int, k: int) -> list[Anchor]:
        """Return, for each source, the last known window that begins no later than the ``k``-th sample of ``lane``.

        For the lane with the smallest position, no lane needs anything before these anchors again.
        """
        position = k * self.lanes + lane
        return [source.anchor(self._mixture.before(position, number)) for number, source in enumerate(self._sources)]

    def shards_between(self, first: tuple[int, int], last: tuple[int, int]) -> int:
        """Count the shards in the windows from one sample to a later one, both as (k, lane) and located before."""
        low, high = (k * self.lanes + lane for k, lane in (first, last))
        return sum(
            source.shards_between(self._mixture.before(low, number), self._mixture.before(high, number))
            for number, source in enumerate(self._sources)
        )

    def forget_before(self, lane: int, k: int) -> None:
        """Forget the windows that end before the ``k``-th sample of ``lane``; no sample in them may be located again.

        Without it, memory grows by one number per window passed: a megabyte in an epoch of 217,000 shards.
        """
        position = k * self.lanes + lane
        for number, source in enumerate(self._sources):
            source.forget_before(self._mixture.before(position, number))


class _Mixture:
    """Map a position to (source, position in that source)."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self._counts = _shares(weights)
        self._listed = np.repeat(np.arange(len(weights), dtype=np.uint8), self._counts)
        self._seed = seed
        # Lanes drift apart and use up to hundreds of blocks at a time. A block takes 17 KB.
        self._blocks = _Recent(self._block, 128)

    def locate(self, position: int) -> tuple[int, int]:
        if len(self._counts) == 1:
            return 0, position
        block, within = divmod(position, BLOCK)
        source = self._blocks((block,)).sources[within]
        return source, self.before(position, source)

    def before(self, position: int, source: int) -> int:
        """Count the positions of ``source`` that come before ``position``."""
        if len(self._counts) == 1:
            return position
        block, within = divmod(position, BLOCK)
        sources, counts = self._blocks((block,))
        part = within // _PART
        in_block = counts[part * len(self._counts) + source] + sources.count(source, part * _PART, within)
        return block * self._counts[source] + in_block

    def _block(self, block: int) -> _Block:
        sources = self._listed.take(_shuffled_block(_keys(self._seed, _MIXTURE, 0, block, 0)))
        number = len(self._counts)
        places = np.arange(BLOCK // _PART).repeat(_PART) * number + sources
        parts = np.bincount(places, minlength=BLOCK // _PART * number).reshape(-1, number)
        counts = np.cumsum(parts, axis=0) - parts
        return _Block(sources.tobytes(), array("H", counts.astype(np.uint16).tobytes()))


class _Block(NamedTuple):
    """The source of each position of a block, and for each part the count of each source before it."""

    sources: bytes
    counts: array[int]


class _SourceOrder:
    """Map a position in one source to (epoch, shard, sample). Window starts are known from the anchor on."""

    def __init__(
        self, number: int, shards: int, count: Count, seed: int, shuffle_shards: int, anchor: Anchor, is_read: IsRead
    ) -> None:
        self._number = number
        self._is_read = is_read
        self._useless = 0  # consecutive windows, up to the last known one, without a sample that is read
        self._shards = shards
        self._count = count
        self._seed = seed
        self._per_window = min(shuffle_shards, shards)
        self._per_epoch = -(-shards // self._per_window)  # windows
        self._first = anchor.window
        self._starts: list[int] = []  # positions at which windows _first, _first + 1, ... begin, as far as known
        self._end = anchor.start  # position at which the last of them ends
        # Lanes drift apart by some sequences, so neighbouring windows are in use at the same time.
        self._windows = _Recent(self._window, 256)

    def locate(self, position: int) -> SampleRef:
        assert position >= (self._starts[0] if self._starts else self._end), "a lane never goes back"
        while position >= self._end:
            self._learn_next()
        place = bisect.bisect_right(self._starts, position) - 1
        window = self._first + place
        shards, ends, keys = self._windows((window,))
        index = shuffled(position - self._starts[place], ends[-1], keys)
        which = bisect.bisect_right(ends, index)
        first = ends[which - 1] if which else 0
        return SampleRef(self._number, window // self._per_epoch, shards[which], index - first)

    def anchor(self, position: int) -> Anchor:
        if not self._starts:
            return Anchor(self._first, self._end)
        place = max(0, bisect.bisect_right(self._starts, position) - 1)
        return Anchor(self._first + place, self._starts[place])

    def forget_before(self, position: int) -> None:
        place = bisect.bisect_right(self._starts, position) - 1
        if place >= _FORGOTTEN:
            del self._starts[:place]
            self._first += place

    def shards_between(self, low: int, high: int) -> int:
        first, last = (bisect.bisect_right(self._starts, position) for position in (low, high))
        return (last - first + 1) * self._per_window

    def _learn_next(self) -> None:
        shards, ends, _ = self._windows((self._first + len(self._starts),))
        self._starts.append(self._end)
        self._end += ends[-1]
        counts = zip(shards, ends, [0, *ends], strict=False)
        self._useless += 1
        if any(end > start and self._is_read(self._number, shard) for shard, end, start in counts):
            self._useless = 0
        if self._useless >= 2 * self._per_epoch:  # that many windows hold every shard at least once, wherever they begin
            raise DataError(
                f"data.train: no shard of source {self._number} has a sample to train on, all are held out or in "
                "quarantine; add shards or lower data.held_out"
            )

    def _window(self, window: int) -> tuple[list[int], list[int], tuple[int, ...]]:
        """Return the shards of a window, the index at which each one's samples end, and the keys that shuffle them all."""
        epoch, number = divmod(window, self._per_epoch)
        keys = _keys(self._seed, _SHARDS, self._number, epoch, 0)
        places = range(number * self._per_window, min((number + 1) * self._per_window, self._shards))
        shards = [shuffled(place, self._shards, keys) for place in places]
        ends = list(itertools.accumulate(self._count(self._number, shard) for shard in shards))
        return shards, ends, _keys(self._seed, _WINDOW, self._number, epoch, number)


def _shares(weights: Sequence[float]) -> list[int]:
    """Return how many positions of a block each source gets, by largest remainder; at least one each."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    order = np.argsort(counts - exact, kind="stable")  # those rounded down most come first, for the largest remainder
    missing = BLOCK - int(counts.sum())
    if missing >= 0:
        counts[order[:missing]] += 1
    else:
        counts[int(np.argmax(counts))] += missing  # sources of tiny weight got more than their share
    return [int(count) for count in counts]


def shuffled(index: int, size: int, keys: Sequence[int]) -> int:
    """Return where ``index`` of ``range(size)`` goes in the permutation that ``keys`` define."""
    bits = max(2, (size - 1).bit_length())
    low = bits // 2
    high = bits - low
    while True:
        # A Feistel round: a hash of the lower half changes the upper one, then they swap. So it stays a bijection.
        left, right = index >> low, index & ((1 << low) - 1)
        width_left, width_right = high, low
        for key in keys:
            mixed = ((right ^ key) * 0x9E3779B97F4A7C15) & _WORD
            mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) & _WORD
            left, right = right, left ^ (mixed >> (64 - width_left))
            width_left, width_right = width_right, width_left
        index = left << low | right
        if index < size:
            return index


def _shuffled_block(keys: Sequence[int]) -> npt.NDArray[np.uint16]:
    """Apply :func:`shuffled` to a whole block at once. Its length is a power of four, so there is no cycle walking."""
    left, right = _HALVES
    for key in keys:
        mixed = (np.arange(1 << _HALF, dtype=np.uint64) ^ np.uint64(key)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        left, right = right, left ^ (mixed >> np.uint64(64 - _HALF)).astype(np.uint16).take(right)
    return left << np.uint16(_HALF) | right


def _keys(seed: int, family: int, source: int, major: int, minor: int) -> tuple[int, ...]:
    """Return the keys of a permutation, which depend on these numbers only."""
    key = np.array([seed & _WORD, (seed >> 64) & _WORD], dtype=np.uint64)
    counter = np.array([0, minor, major, family | source << 8], dtype=np.uint64)
    return tuple(np.random.Philox(key=key, counter=counter).random_raw(_ROUNDS).tolist())


class _Recent:
    """Cache the last few results of a pure function."""

    def __init__(self, function: Callable[..., Any], size: int) -> None:
        self._function = function
        self._size = size
        self._kept: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    def __call__(self, key: tuple[int, ...]) -> Any:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        value = self._kept[key] = self._function(*key)
        if len(self._kept) > self._size:
            self._kept.popitem(last=False)
        return value
