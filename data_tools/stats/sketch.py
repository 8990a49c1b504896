"""Summarise numbers in bounded memory: exact count, range, mean and deviation; quantiles to a quarter per cent.

Buckets grow by a constant ratio, as in DDSketch (Masson, Rim and Lee, VLDB 2019). The same numbers give the same buckets
in any order, and the sketches of parts add up to the sketch of the whole, so the number of processes does not matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

_RATIO = math.log(1.005)  # ratio of a bucket's upper end to its lower end
_LEAST, _MOST = 1e-9, 1e15  # smaller numbers count as zero; larger ones share a bucket
_SHIFT = 5000  # more than the number of buckets below 1
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass
class Sketch:
    """The distribution of the numbers added, in at most 22,000 buckets."""

    count: int = 0
    least: float = math.inf
    most: float = -math.inf
    mean: float = 0.0
    whole: bool = True  # whether all numbers are whole
    _squares: float = 0.0  # sum of squared distances from the mean
    _buckets: dict[int, int] = field(default_factory=dict)

    def add(self, value: float) -> None:
        """Add a finite number."""
        self.count += 1
        self.least, self.most = min(self.least, value), max(self.most, value)
        self.whole = self.whole and value == int(value)
        off = value - self.mean
        self.mean += off / self.count
        self._squares += off * (value - self.mean)
        bucket = _bucket(value)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1

    def merge(self, other: Sketch) -> None:
        """Add all numbers of ``other``."""
        if not other.count:
            return
        together = self.count + other.count
        off = other.mean - self.mean
        self._squares += other._squares + off * off * self.count * other.count / together
        self.mean += off * other.count / together
        self.count = together
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)
        self.whole = self.whole and other.whole
        for bucket, count in other._buckets.items():
            self._buckets[bucket] = self._buckets.get(bucket, 0) + count

    def quantile(self, share: float) -> float:
        """Return the quantile at ``share`` (0 to 1); exact for whole numbers up to 200."""
        rank, below = share * (self.count - 1), 0
        for bucket in sorted(self._buckets):
            below += self._buckets[bucket]
            if below > rank:
                low, high = _ends(bucket)
                middle = (low + high) / 2
                return min(max(float(round(middle)) if self.whole else middle, self.least), self.most)
        return self.most

    def deviation(self) -> float:
        """Return the standard deviation."""
        return math.sqrt(max(self._squares, 0.0) / self.count) if self.count else 0.0

    def is_skewed(self) -> bool:
        """Return whether a logarithmic axis suits the numbers; probabilities are easier to read on a linear one."""
        return self.least >= 1 and self.quantile(0.99) > 30 * self.quantile(0.05)

    def histogram(self, bins: int = 40) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return edges (at most ``bins`` + 1) and counts; the edges are logarithmic if the numbers are skewed.

        Few whole numbers get a bin each. A bucket that crosses an edge is divided in proportion to length.
        """
        if self.whole and self.most - self.least < bins:
            edges = np.arange(self.least - 0.5, self.most + 1.0)
        elif self.is_skewed():
            edges = np.geomspace(self.least, self.most, bins + 1)
        else:
            edges = np.linspace(self.least, self.most, bins + 1)
        if edges[0] == edges[-1]:
            return np.array([self.least, self.most]), np.array([float(self.count)])
        counts = np.zeros(len(edges) - 1)
        for bucket in sorted(self._buckets):
            low, high = (min(max(end, self.least), self.most) for end in _ends(bucket))
            if self.whole:
                # A narrow bucket holds one whole number, which lies in the middle of its own bin.
                low, high = (low, high) if high - low > 2 else (round((low + high) / 2),) * 2
            if high > low:
                shares = np.diff(np.clip(edges, low, high)) / (high - low)
            else:
                shares = np.zeros(len(counts))
                shares[min(max(int(np.searchsorted(edges, low, side="right")) - 1, 0), len(counts) - 1)] = 1
            counts += self._buckets[bucket] * shares
        return edges, counts

    def as_json(self) -> dict[str, Any]:
        """Return all figures under plain names."""
        if not self.count:
            return {"count": 0}
        edges, counts = self.histogram()
        quantiles = {f"p{round(100 * share):02d}": self.quantile(share) for share in QUANTILES}
        return {
            "count": self.count,
            "min": self.least,
            "max": self.most,
            "mean": self.mean,
            "std": self.deviation(),
            **quantiles,
            "histogram": {"edges": edges.tolist(), "counts": [round(count, 2) for count in counts.tolist()]},
        }


def _bucket(value: float) -> int:
    size = abs(value)
    if size < _LEAST:
        return 0
    place = math.ceil(math.log(min(size, _MOST)) / _RATIO - 1e-9) + _SHIFT
    return place if value > 0 else -place


def _ends(bucket: int) -> tuple[float, float]:
    if bucket == 0:
        return 0.0, 0.0
    place = abs(bucket) - _SHIFT
    low, high = math.exp((place - 1) * _RATIO), math.exp(place * _RATIO)
    return (low, high) if bucket > 0 else (-high, -low)
