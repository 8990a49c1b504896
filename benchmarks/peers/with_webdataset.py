"""webdataset as its documentation uses it: shard shuffle, sample buffer of 1,000, batches made in the workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import webdataset
from peers.measure import DECODERS, Item, Loader, Setting, collate, run
from peers.pictures import write_tars
from torch import Tensor

SHARD = 400


def prepare(jpegs: Sequence[Path], out: Path) -> None:
    """Tars of ``SHARD`` samples."""
    write_tars(jpegs, out, SHARD)


class WebDatasetLoader(Loader):
    """No resume: webdataset has none."""

    resumable = False

    def __init__(self, setting: Setting, state: Any) -> None:
        shards = sorted(map(str, setting.data.glob("*.tar")))
        dataset = (
            webdataset.WebDataset(shards, shardshuffle=100)
            .shuffle(1000)
            .map(partial(_item, setting.decoder))
            .batched(setting.batch, collation_fn=collate)
        )
        self._loader = webdataset.WebLoader(
            dataset, batch_size=None, num_workers=setting.workers, persistent_workers=setting.workers > 0
        )

    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        while True:
            for pixels, keys, _ in self._loader:
                yield pixels, keys


def _item(decoder: str, sample: dict[str, Any]) -> Item:
    return DECODERS[decoder](sample["jpg"]), sample["__key__"], sample["txt"].decode()


if __name__ == "__main__":
    run(prepare, WebDatasetLoader)
