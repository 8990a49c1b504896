"""Which sample comes when: pure arithmetic on (samples per shard, seed, lanes). Opens no file, knows no rank.

The data set is one endless stream. Position q lies in epoch ``q // N`` (N samples in all). An epoch is a permutation
of the shards, cut into windows of ``shuffle_window`` consecutive samples, each permuted in turn: every sample exactly
once, while a reader touches only the few shards of one window at a time. Lane l of G takes the positions ``k * G + l``,
for k = 0, 1, 2, ... A lane is one sequence of the global batch, so G is the global batch and ranks do not enter.

Permutations sort the raw output of Philox (Salmon et al., SC'11) in place of ``numpy.random.Generator.permutation``,
because NumPy promises to keep the raw streams for ever but not the methods built on them, and a run must find the same
order after an upgrade.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_WORD = (1 << 64) - 1
_SHARDS, _WINDOW = 0, 1  # what a permutation is of: keeps the two families of streams apart
_CACHED_POSITIONS = 1 << 22  # windows kept at hand hold at most this many positions (16 MiB)


class SampleRef(NamedTuple):
    """One sample in one epoch: ``shard`` counts in the list of shards, ``sample`` within the shard."""

    epoch: int
    shard: int
    sample: int


class SampleOrder:
    """The global order of samples.

    Args:
        counts: samples of each shard, in the order of the list of shards.
        seed: seed of the run.
        lanes: sequences of the global batch (G).
        shuffle_window: samples that are shuffled among each other.

    Memory is O(shards) per epoch in use and O(shuffle_window) per window in use; nothing is proportional to N.
    """

    def __init__(self, counts: Sequence[int], seed: int, lanes: int, shuffle_window: int) -> None:
        self._counts: npt.NDArray[np.int64] = np.asarray(counts, dtype=np.int64)
        self.samples = int(self._counts.sum())
        assert self.samples > 0 and self._counts.min() >= 0 and lanes > 0 and shuffle_window > 0 and seed >= 0
        self.seed = seed
        self.lanes = lanes
        self.shuffle_window = min(shuffle_window, self.samples)
        # lanes drift apart by some sequences, so neighbouring windows and epochs are in use at the same time
        self._epochs = _Recent(self._shard_order, 4)
        self._windows = _Recent(self._window_order, min(64, max(2, _CACHED_POSITIONS // self.shuffle_window)))

    def locate(self, lane: int, k: int) -> SampleRef:
        """The ``k``-th sample of ``lane``."""
        epoch, position = divmod(k * self.lanes + lane, self.samples)
        window, within = divmod(position, self.shuffle_window)
        shuffled = window * self.shuffle_window + int(self._windows((epoch, window))[within])
        shards, ends = self._epochs((epoch,))
        place = int(np.searchsorted(ends, shuffled, side="right"))
        shard = int(shards[place])
        first = int(ends[place]) - int(self._counts[shard])
        return SampleRef(epoch, shard, shuffled - first)

    def _shard_order(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Shards in the order of the epoch, and the position at which each ends."""
        shards = _permutation(len(self._counts), self.seed, _SHARDS, epoch, 0)
        return shards, np.cumsum(self._counts[shards])

    def _window_order(self, epoch: int, window: int) -> npt.NDArray[np.uint32]:
        size = min(self.shuffle_window, self.samples - window * self.shuffle_window)
        return _permutation(size, self.seed, _WINDOW, epoch, window).astype(np.uint32)


def _permutation(size: int, seed: int, family: int, epoch: int, window: int) -> npt.NDArray[np.int64]:
    """A permutation of ``range(size)`` that depends on the other arguments only."""
    key = np.array([seed & _WORD, (seed >> 64) & _WORD], dtype=np.uint64)
    counter = np.array([0, window, epoch, family], dtype=np.uint64)  # word 0 counts the numbers drawn
    raw = np.random.Philox(key=key, counter=counter).random_raw(size)
    return np.argsort(raw, kind="stable").astype(np.int64)


class _Recent:
    """Keeps the last few results of a pure function."""

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
