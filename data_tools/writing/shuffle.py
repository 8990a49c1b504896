"""Permute any number of samples uniformly, in pieces that fit in memory.

Sample i gets the i-th number of a Philox stream (Salmon et al., SC'11), whose raw numbers NumPy keeps unchanged, and the
samples are sorted by their numbers. A piece is the samples whose numbers lie in one interval. The stream is generated
again for each piece, which costs some nanoseconds per sample, so that only the piece is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

_WORD = (1 << 64) - 1
_RESHARD = 2  # separates this stream from those of the training order
_CHUNK = 1 << 20  # numbers drawn at a time


def shuffled(samples: int, seed: int, piece: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield a permutation of ``range(samples)`` in consecutive pieces of about ``piece``.

    The permutation depends on ``samples`` and ``seed`` alone.
    """
    intervals = max(1, -(-samples // piece))
    for interval in range(intervals):
        low = (_WORD + 1) * interval // intervals
        high = (_WORD + 1) * (interval + 1) // intervals - 1
        ids, numbers = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.uint64)]
        for first, drawn in _numbers(samples, seed):
            inside = np.flatnonzero((drawn >= np.uint64(low)) & (drawn <= np.uint64(high)))
            ids.append(inside + first)
            numbers.append(drawn[inside])
        yield np.concatenate(ids)[np.argsort(np.concatenate(numbers), kind="stable")]


def _numbers(samples: int, seed: int) -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
    key = np.array([seed & _WORD, (seed >> 64) & _WORD], dtype=np.uint64)
    stream = np.random.Philox(key=key, counter=np.array([0, 0, 0, _RESHARD], dtype=np.uint64))
    for first in range(0, samples, _CHUNK):
        yield first, stream.random_raw(min(_CHUNK, samples - first))
