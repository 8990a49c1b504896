"""Megatron Energon: WebDataset tars indexed by ``energon prepare``, buffers as in its documentation, savable loader."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.energon import (
    CaptioningSample,
    DefaultTaskEncoder,
    WorkerConfig,
    get_savable_loader,
    get_train_dataset,
    stateless,
)
from peers.measure import DECODERS, Batch, Item, Loader, Setting, collate, run
from peers.pictures import write_tars
from torch import Tensor

SHARD = 400


def prepare(jpegs: Sequence[Path], out: Path) -> None:
    """The tars that webdataset gets, and what ``energon prepare`` writes beside them."""
    write_tars(jpegs, out, SHARD)
    energon = Path(sys.executable).with_name("energon")
    command = [str(energon), "prepare", str(out), "--non-interactive", "--split-ratio", "1,0,0", "--num-workers", "2"]
    command += ["--sample-type", "CaptioningSample", "--field-map", '{"image": "jpg", "caption": "txt"}', "--no-progress"]
    subprocess.run(command, check=True, stdout=sys.stderr)


class Encoder(DefaultTaskEncoder[CaptioningSample, Item, Batch, Batch]):
    """Decodes in place of energon's own decoder, so that both decoders can be measured."""

    decoder = None

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.decode = DECODERS[setting.decoder]

    @stateless
    def encode_sample(self, sample: Any) -> Item:
        """Pixels, key and caption."""
        return self.decode(sample.image), sample.__key__.rpartition("/")[2], sample.caption.decode()

    @stateless
    def batch(self, samples: list[Item]) -> Batch:
        """One tensor of the pictures."""
        return collate(samples)


class EnergonLoader(Loader):
    """State: that of ``SavableDataLoader``."""

    def __init__(self, setting: Setting, state: Any) -> None:
        dataset = get_train_dataset(
            setting.data,
            batch_size=setting.batch,
            shuffle_buffer_size=100,
            max_samples_per_sequence=100,
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=setting.workers),
            task_encoder=Encoder(setting),
        )
        self._loader = get_savable_loader(dataset)
        if state is not None:
            self._loader.restore_state_rank(state)

    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        while True:
            for pixels, keys, _ in self._loader:
                yield pixels, keys

    def state(self) -> Any:
        return self._loader.save_state_rank()


if __name__ == "__main__":
    run(prepare, EnergonLoader)
