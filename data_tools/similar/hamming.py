"""Find hashes within a small Hamming distance of an earlier one, exactly and without comparing all pairs.

If the 64 bits are cut into D + 1 bands, two hashes that differ in at most D bits agree in at least one band. So the hashes
are sorted by each band in turn, and only those that agree in it are compared, one shift of the sorted list at a time.
Memory is a few words per distinct hash and two per pair found. The work grows with the number of hashes that share a
band: with D = 4 a band has 12 or 13 bits, with D = 8 only 7, so a large distance on a large set takes long.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

_BITS = 64
_CHUNK = 1 << 20  # pairs converted to Python integers at a time
Indices = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


def first_near(hashes: Hashes, distance: int, always_kept: int = 0) -> Indices:
    """Return, for each of ``hashes`` (n,) in order, the earlier one that it duplicates; -1 if it is kept.

    A hash is dropped if it differs in at most ``distance`` bits from a *kept* one before it; its partner is the first
    such. So every dropped hash is near a kept one, and of a chain of pictures, each near the next, more than one may be
    kept. The first ``always_kept`` hashes are always kept.
    """
    distinct, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    # Only the first of equal hashes is compared: the later ones are near to it, or near to what it is near to.
    order = np.argsort(first, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    earlier, later = _pairs(distinct[order], distance)
    partner = _resolve(len(distinct), earlier, later, int(np.count_nonzero(first < always_kept)))
    first = first[order].astype(np.int64)
    place = rank[which]  # of each hash in the order of first appearance
    at = partner[place]
    result = np.where(at >= 0, first[at], first[place])
    result[result == np.arange(len(hashes))] = -1
    result[:always_kept] = -1
    return result


def _pairs(hashes: Hashes, distance: int) -> tuple[Indices, Indices]:
    """Return all (i, j), i < j, of distinct ``hashes`` that differ in at most ``distance`` bits, by j and then i."""
    found: list[npt.NDArray[np.uint64]] = [np.empty(0, dtype=np.uint64)]
    edges = [_BITS * band // (distance + 1) for band in range(distance + 2)]
    for low, high in pairwise(edges):
        found.append(_pairs_in_band(hashes, low, high, distance))
    # One number per pair. Sorting it orders by the later hash and removes pairs found in several bands.
    joined = np.unique(np.concatenate(found))
    return (joined & np.uint64(0xFFFFFFFF)).astype(np.int64), (joined >> np.uint64(32)).astype(np.int64)


def _pairs_in_band(hashes: Hashes, low: int, high: int, distance: int) -> npt.NDArray[np.uint64]:
    assert len(hashes) < 1 << 32  # a pair is packed into 64 bits
    band = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
    order = np.argsort(band, kind="stable").astype(np.int64)
    sorted_band, sorted_hashes = band[order], hashes[order]
    end = np.searchsorted(sorted_band, sorted_band, side="right")
    found: list[npt.NDArray[np.uint64]] = [np.empty(0, dtype=np.uint64)]
    active = np.arange(len(hashes), dtype=np.int64)
    shift = 0
    while True:
        shift += 1
        active = active[active + shift < end[active]]
        if not len(active):
            return np.concatenate(found)
        apart = np.bitwise_count(sorted_hashes[active] ^ sorted_hashes[active + shift])
        near = active[apart <= distance]
        # The sort is stable, so within a band an earlier place in the list is an earlier place in the set.
        earlier, later = order[near].astype(np.uint64), order[near + shift].astype(np.uint64)
        found.append((later << np.uint64(32)) | earlier)


def _resolve(size: int, earlier: Indices, later: Indices, always_kept: int) -> Indices:
    """Return the first kept hash before each that it is near to; -1 if there is none. Pairs are sorted by ``later``."""
    partner: list[int] = [-1] * size
    for start in range(0, len(later), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        for i, j in zip(earlier[chunk].tolist(), later[chunk].tolist(), strict=True):
            if partner[j] < 0 and (i < always_kept or partner[i] < 0):
                partner[j] = i
    return np.asarray(partner, dtype=np.int64)
