"""The work of benchmarks/data_scale.py's worker processes: locate samples, decode none. Imports no torch."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe.data.order.position import DataState
from megamoe.data.order.sample_order import SampleOrder
from megamoe.data.shards.catalog import Catalog, DataSet
from megamoe.data.shards.storage import Storage


@dataclass(frozen=True)
class Case:
    """What one measurement varies."""

    shards: int
    samples: int
    varying: bool
    global_batch: int
    nodes: int
    ranks: int
    workers: int
    shuffle_shards: int
    per_sequence: float
    deviation: float
    steps: int
    sources: int = 1
    seed: int = 1

    @property
    def train(self) -> list[dict[str, Any]]:
        """Name the shards as a user does: equal parts, one per source, with weights 1, 2, 3, ..."""
        last = self.shards // self.sources - 1
        return [
            {"shards": f"s3://laion2b-en/part-{number}/{{000000..{last:06d}}}.tar", "weight": number + 1}
            for number in range(self.sources)
        ]

    def count(self, source: int, shard: int) -> int:
        """Return the samples of a shard, as its index would."""
        if not self.varying:
            return self.samples
        return self.samples // 2 + (shard * 2654435761 % (1 << 32)) % (self.samples + 1)


class LocateWork:
    """Locates the first sample of each lane, then those of ``case.steps`` steps."""

    def __init__(self, case: Case, data: DataSet, state: DataState) -> None:
        self._case, self._data, self._state = case, data, state

    def preload(self) -> None:
        """Import nothing: the loader's own work would import its packages here."""

    def serve(self, worker: int, workers: int, memory: mmap.mmap) -> Iterator[dict[str, Any]]:
        """Yield the seconds for the first samples, then microseconds per sample and windows from first lane to last."""
        case, cursors = self._case, self._state.cursors
        started = time.perf_counter()
        catalog = Catalog(self._data, Storage())
        order = SampleOrder(
            [len(source.shards) for source in self._data.sources],
            [source.weight for source in self._data.sources],
            case.count,
            seed=case.seed,
            lanes=case.global_batch,
            shuffle_shards=case.shuffle_shards,
            anchors=self._state.anchors,
        )
        lanes = list(cursors)[len(cursors) * worker // workers : len(cursors) * (worker + 1) // workers]
        for lane in lanes:
            sample = order.locate(lane, cursors[lane])
            catalog.label(sample.source, sample.shard)
        yield {"first": time.perf_counter() - started}
        started = time.perf_counter()
        taken = round(case.per_sequence)
        for step in range(case.steps):
            for lane in lanes:
                for k in range(taken):
                    sample = order.locate(lane, cursors[lane] + step * taken + k)
                    catalog.label(sample.source, sample.shard)
        seconds = time.perf_counter() - started
        positions = [cursors[lane] * case.global_batch for lane in lanes]
        spread = (max(positions) - min(positions)) / (case.samples * case.shuffle_shards)
        while True:  # stay alive while the memory is measured
            yield {"us": 1e6 * seconds / (case.steps * len(lanes) * taken), "spread": spread}


INDEX = Path("index")  # never opened
