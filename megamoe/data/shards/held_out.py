"""Decide which samples are held out, by the key alone, so that the split stays the same after resharding.

A key's hash is the first 8 bytes of its blake2b (RFC 7693, digest size 8), big-endian: an integer h from 0 to 2^64 - 1,
which puts the key at the fraction h / 2^64. Shares are exact decimal numbers, as written, and the bounds between parts are
integers (``floor(sum of shares * 2^64)``), so rounding never decides where a sample goes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np
import numpy.typing as npt

_SPAN = 1 << 64


def key_hash(key: str) -> int:
    """Return the hash of ``key``, 0 to 2^64 - 1."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest(), "big")


def key_hashes(keys: Iterable[str]) -> npt.NDArray[np.uint64]:
    """Return :func:`key_hash` of each key."""
    return np.fromiter(map(key_hash, keys), dtype=np.uint64)


def bounds(shares: Sequence[Fraction]) -> list[int]:
    """Return where each part ends: a key belongs to the first part i with ``key_hash(key) < bounds[i]``.

    ``shares`` are those of the parts, in order; their sum is 1.
    """
    assert sum(shares) == 1 and min(shares) >= 0
    return [int(end * _SPAN) for end in accumulate(shares)]


def held_out(hashes: npt.NDArray[np.uint64], share: float) -> npt.NDArray[np.bool_]:
    """Return which of ``hashes`` (n,) are held out if ``share`` of all keys is: those at the upper end.

    They are the samples in the second part of ``megamoe data split --shares <1 - share>,<share>``. A larger share holds
    out all samples that a smaller one does.
    """
    assert hashes.dtype == np.uint64 and 0 <= share <= 1
    exact = Fraction(repr(float(share)))  # 0.01 is a hundredth, not the binary number next to it
    first = bounds([1 - exact, exact])[0]
    if first == _SPAN:  # which does not fit in 64 bits
        return np.zeros(hashes.shape, dtype=np.bool_)
    return hashes >= np.uint64(first)
