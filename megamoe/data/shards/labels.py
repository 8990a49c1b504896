"""Name shards in sample ids, ``<label>#<key>``, in little memory: every process of a node holds the labels of all."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np

from megamoe.core.urls import is_plain, masked, scheme, unsigned
from megamoe.data.shards.names import name_hashes, repeated


class ShardLabels:
    """Map each shard to its label. Construct it from all shards; call it with one.

    A label is the file name without its folder (for a command: the last file name that it mentions), so that ids survive
    a move of the data. Shards that share a file name are labelled by their whole name, so that ids stay unique. Secrets
    in URLs never become part of an id: if whole names differ in nothing else, a hash of each is added.

    All sets made by img2dataset begin with ``00000.tar``, so many file names may repeat. Only eight bytes are kept of
    each, and they are the same in every process.
    """

    def __init__(self, *groups: Sequence[str]) -> None:
        self._repeated: np.ndarray[tuple[int], np.dtype[np.uint64]] = np.empty(0, dtype=np.uint64)
        self._alike: frozenset[str] = frozenset()  # whole names that several shards have
        twice = repeated(name_hashes(map(_file_name, chain.from_iterable(groups))))
        if not twice:
            return
        numbers, whole = bytearray(), Counter[str]()
        for shard in chain.from_iterable(groups):
            name = _file_name(shard)
            if hash(name) in twice:
                numbers += _digest(name)
                if not is_plain(shard):
                    whole[_whole_name(shard)] += 1
        found, counts = np.unique(np.frombuffer(numbers, dtype=np.uint64), return_counts=True)
        self._repeated = found[counts > 1]  # `twice` compares hashes, which by chance are equal for different names
        if whole:  # a plain name is its own whole name
            whole.update(shard for shard in chain.from_iterable(groups) if shard in whole and is_plain(shard))
        self._alike = frozenset(name for name, count in whole.items() if count > 1)

    def __call__(self, shard: str) -> str:
        """Return the label of one of the shards."""
        name = _file_name(shard)
        if not self._is_repeated(name):
            return name
        whole = _whole_name(shard)
        if whole not in self._alike:
            return whole
        return f"{whole}~{hashlib.sha256(os.fsencode(unsigned(shard))).hexdigest()[:12]}"

    def _is_repeated(self, name: str) -> bool:
        if not len(self._repeated):
            return False
        (number,) = np.frombuffer(_digest(name), dtype=np.uint64)
        place = int(np.searchsorted(self._repeated, number))
        return place < len(self._repeated) and bool(self._repeated[place] == number)


def shard_labels(shards: Sequence[str]) -> list[str]:
    """Return the labels of ``shards``, which must be all shards of the set: see :class:`ShardLabels`."""
    return list(map(ShardLabels(shards), shards))


def _digest(name: str) -> bytes:
    """Return a 64-bit hash of ``name`` that is the same in every process; Python's own hash is not."""
    return hashlib.blake2b(os.fsencode(name), digest_size=8).digest()


def _file_name(shard: str) -> str:
    if is_plain(shard):
        return shard.rpartition("/")[2]
    kind = scheme(shard)
    if kind is None:
        return os.path.basename(shard)
    if kind == "pipe":
        words = [os.path.basename(word.partition("?")[0]) for word in re.split(r"[\s'\"<>|;&()=]+", shard)]
        return next((word for word in reversed(words) if word.endswith(".tar")), masked(shard))
    return _whole_name(shard).rpartition("/")[2]


def _whole_name(shard: str) -> str:
    """Return ``shard`` without secrets, as it may be shown to anybody."""
    return masked(shard.partition("?")[0] if scheme(shard) in ("http", "https") else shard)
