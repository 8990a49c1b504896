"""Put webdataset's stages behind a :class:`.ShardDataset` without losing its state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import webdataset as wds


class ShardPipeline(wds.DataPipeline, wds.FluidInterface):
    """A :class:`.ShardDataset` followed by stages of webdataset, with the state of the data set."""

    def append(self, f: Any) -> None:
        """Add a stage.

        ``wds.batched`` yields a batch only after it has read a sample of the next one, which would be lost when the state
        is saved or the pass ends. A version that does not read ahead takes its place.
        """
        if isinstance(f, wds.filters.FilterFunction) and f.f is wds.filters.batched.f:
            f = wds.filters.FilterFunction(_batched, *f.args, **f.kw)
        super().append(f)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the data set: :meth:`megamoe.data.library.dataset.ShardDataset.state_dict`."""
        return self.pipeline[0].state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Resume the data set: :meth:`megamoe.data.library.dataset.ShardDataset.load_state_dict`."""
        self.pipeline[0].load_state_dict(state)


def _batched(
    samples: Iterator[Any],
    batchsize: int = 20,
    collation_fn: Callable[[list[Any]], Any] | None = wds.filters.default_collation_fn,
    partial: bool = True,
) -> Iterator[Any]:
    while batch := list(islice(samples, batchsize)):
        if partial or len(batch) == batchsize:
            yield batch if collation_fn is None else collation_fn(batch)
