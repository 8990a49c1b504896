"""litdata: chunks made by ``optimize``, its own shuffle and its resumable DataLoader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from litdata import StreamingDataLoader, StreamingDataset, optimize
from peers.measure import DECODERS, Item, Loader, Setting, collate, run
from peers.pictures import read_pictures
from torch import Tensor


def prepare(jpegs: Sequence[Path], out: Path) -> None:
    """Chunks of 16 MB, the JPEGs as they are."""
    optimize(fn=_sample, inputs=[str(jpeg) for jpeg in jpegs], output_dir=str(out), chunk_bytes="16MB", num_workers=1)


class Pictures(StreamingDataset):
    """Decodes what it reads."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(str(setting.data), shuffle=True)
        self.decode = DECODERS[setting.decoder]

    def __getitem__(self, at: Any) -> Item:
        sample = super().__getitem__(at)
        return self.decode(sample["jpg"]), sample["key"], sample["txt"]


class LitDataLoader(Loader):
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


def _sample(jpeg: str) -> dict[str, Any]:
    key, data, caption = next(read_pictures([Path(jpeg)]))
    return {"key": key, "jpg": data, "txt": caption}


if __name__ == "__main__":
    run(prepare, LitDataLoader)
