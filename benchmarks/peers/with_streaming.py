"""MosaicML Streaming: MDS shards, its own shuffle and its resumable DataLoader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peers.measure import DECODERS, Item, Loader, Setting, collate, run
from peers.pictures import read_pictures
from torch import Tensor

if not torch.backends.cuda.is_built():
    # streaming imports torchvision, whose registry wheel is built for CUDA and finds no operators of its own with a CPU
    # build of torch. Nothing here uses them; the two that its import looks up only have to be declared.
    torchvision_operators = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        torchvision_operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset


def prepare(jpegs: Sequence[Path], out: Path) -> None:
    """MDS shards of 16 MB, the JPEGs as they are."""
    columns = {"key": "str", "jpg": "bytes", "txt": "str"}
    with MDSWriter(out=str(out), columns=columns, size_limit=1 << 24) as writer:
        for key, jpeg, caption in read_pictures(jpegs):
            writer.write({"key": key, "jpg": jpeg, "txt": caption})


class Pictures(StreamingDataset):
    """Decodes what it reads."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(local=str(setting.data), shuffle=True, batch_size=setting.batch)
        self.decode = DECODERS[setting.decoder]

    def __getitem__(self, at: Any) -> Item:
        sample = super().__getitem__(at)
        return self.decode(sample["jpg"]), sample["key"], sample["txt"]


class MosaicLoader(Loader):
    """State: that of ``StreamingDataLoader``."""

    def __init__(self, setting: Setting, state: Any) -> None:
        self._loader = StreamingDataLoader(
            Pictures(setting),
            batch_size=setting.batch,
            num_workers=setting.workers,
            persistent_workers=setting.workers > 0,
            collate_fn=collate,
        )
        if state is not None:
            self._loader.load_state_dict(state)

    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        while True:
            for pixels, keys, _ in self._loader:
                yield pixels, keys

    def state(self) -> Any:
        return self._loader.state_dict()


if __name__ == "__main__":
    run(prepare, MosaicLoader)
