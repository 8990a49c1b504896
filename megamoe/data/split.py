"""Which samples are held out: decided by the key alone, so that it stays when shards are re-cut, moved or renamed."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def key_hash(key: str) -> int:
    """A number in [0, 2^64) that depends on ``key`` only (BLAKE2b, 8 bytes, big-endian)."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest(), "big")


def held_out(hashes: npt.NDArray[np.uint64], share: float) -> npt.NDArray[np.bool_]:
    """For each key hash whether its sample is held out: those below ``share`` of the range, exactly.

    A larger share holds out the same samples and more.
    """
    limit = int(share * 2**64)  # exact: a float times a power of two
    if limit >= 2**64:
        return np.ones(hashes.shape, dtype=np.bool_)
    return hashes < np.uint64(limit)
