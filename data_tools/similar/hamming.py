"""Hashes that lie within a few bits of an earlier one, found exactly and without comparing all with all.

Two hashes that differ in at most D bits agree in at least one of D + 1 bands that the 64 bits are cut into. So for each
band the hashes are sorted by it, and only those that agree in it are compared, one shift of the sorted list at a time.
Memory is a few words per distinct hash and two per pair found. The work grows with the number of hashes that share a
band: with D = 4 a band has 12 or 13 bits, with D = 8 only 7, so a large distance over a large set takes long.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

_BITS = 64
_CHUNK = 1 << 20  # pairs that are Python integers at a time
Indices = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


def first_near(hashes: Hashes, distance: int, always_kept: int = 0) -> Indices:
    """For each of ``hashes`` (n,), in order, the earlier one that it is dropped for; -1 if it is kept.

    A hash is dropped if it differs in at most ``distance`` bits from a *kept* one before it, and its partner is the
    first such. So what is dropped is near something that stays, and of a chain of pictures, each near the next, more
    than one may stay. The first ``always_kept`` hashes are kept in any case.
    """
    distinct, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    # A later equal of a hash has the fate of the first: if that is kept it is near it, else near what that is near to.
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
    """All (i, j), i < j, of distinct ``hashes`` that differ in at most ``distance`` bits, by j and then i."""
    found: list[npt.NDArray[np.uint64]] = [np.empty(0, dtype=np.uint64)]
    edges = [_BITS * band // (distance + 1) for band in range(distance + 2)]
    for low, high in pairwise(edges):
        found.append(_pairs_in_band(hashes, low, high, distance))
    # one number per pair: sorted by the later one, pairs that agree in several bands once
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
        # the sort is stable, so within a band what comes earlier in the list is earlier in the set
        earlier, later = order[near].astype(np.uint64), order[near + shift].astype(np.uint64)
        found.append((later << np.uint64(32)) | earlier)


def _resolve(size: int, earlier: Indices, later: Indices, always_kept: int) -> Indices:
    """The first kept one before each that it is near to, -1 if there is none. Pairs are sorted by ``later``."""
    partner: list[int] = [-1] * size
    for start in range(0, len(later), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        for i, j in zip(earlier[chunk].tolist(), later[chunk].tolist(), strict=True):
            if partner[j] < 0 and (i < always_kept or partner[i] < 0):
                partner[j] = i
    return np.asarray(partner, dtype=np.int64)
