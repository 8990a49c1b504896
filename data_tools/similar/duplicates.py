"""Find the samples of a set that are equal or near to one that is kept, from the fingerprints of all shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_tools.similar.fingerprints import load_fingerprints
from data_tools.similar.hamming import Indices, first_near


class Duplicate(NamedTuple):
    """A sample to drop and its kept partner, each as (number of the file, place in it), and the differing bits."""

    sample: tuple[int, int]
    partner: tuple[int, int]
    distance: int


def find_duplicates(files: Sequence[Path], protected: int, distance: int | None) -> Iterator[Duplicate]:
    """Yield the duplicates among the samples whose fingerprints are in ``files``, in order.

    Args:
        files: written by :func:`data_tools.similar.fingerprints.hash_shard`; of equal samples the first is kept.
        protected: number of files at the beginning from which nothing is dropped.
        distance: maximum number of differing bits; None: fingerprints are digests, equal or not.
    """
    loaded = [load_fingerprints(file) for file in files]
    starts = np.cumsum([0] + [len(each.comparable) for each in loaded])
    places = np.flatnonzero(np.concatenate([each.comparable for each in loaded]))
    values = np.concatenate([each.values for each in loaded])[places]
    del loaded
    always_kept = int(np.count_nonzero(places < starts[protected]))
    if distance is None:
        partners = _first_equal(values, always_kept)
    else:
        partners = first_near(values.view(">u8").reshape(-1).astype(np.uint64), distance, always_kept)

    def locate(place: int) -> tuple[int, int]:
        file = int(np.searchsorted(starts, place, side="right")) - 1
        return file, place - int(starts[file])

    for i in np.flatnonzero(partners >= 0).tolist():
        partner = int(partners[i])
        bits = int(np.bitwise_count(values[i] ^ values[partner]).sum())
        yield Duplicate(locate(int(places[i])), locate(int(places[partner])), bits)


def _first_equal(values: npt.NDArray[np.uint8], always_kept: int) -> Indices:
    """Find the partners of equal digests, uint8 (n, 32), as :func:`data_tools.similar.hamming.first_near` does."""
    rows = values.view(f"V{values.shape[1]}").reshape(-1)
    _, first, which = np.unique(rows, return_index=True, return_inverse=True)
    partners: Indices = first[which].astype(np.int64)
    partners[partners == np.arange(len(partners))] = -1
    partners[:always_kept] = -1
    return partners
