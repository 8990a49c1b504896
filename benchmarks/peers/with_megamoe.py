"""MegaMoE's StepLoader: plain tars, one picture per packed sequence, captions tokenised and packed as in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peers.measure import Loader, Setting, run
from peers.pictures import read_pictures, write_tars
from torch import Tensor

from megamoe.config.data import DataConfig
from megamoe.config.model import VisionConfig
from megamoe.data.loader.step_loader import StepLoader
from megamoe.data.order.position import DataState
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.sample.vocabulary import model_path, train_tokenizer
from megamoe.data.shards.from_config import open_data_set
from megamoe.data.shards.index import learn_index

SHARD = 400
ROOM = 60  # tokens of a sequence beside the picture's, enough for every caption


def prepare(jpegs: Sequence[Path], out: Path) -> None:
    """The tars that webdataset gets, their indexes and a vocabulary."""
    write_tars(jpegs, out, SHARD)
    for tar in sorted(out.glob("*.tar")):
        learn_index(tar, None)
    train_tokenizer((caption for _, _, caption in read_pictures(jpegs)), out / "tokenizer", 300)


class MegaMoELoader(Loader):
    """State: what a checkpoint has of it. It decodes as it always does, with simplejpeg."""

    def __init__(self, setting: Setting, state: Any) -> None:
        vision = VisionConfig()
        data = DataConfig(
            train=[str(setting.data)],
            sequence_length=vision.patches + ROOM,
            images_per_sequence=1,
            workers=setting.workers,
        )
        self._loader = StepLoader(
            data,
            vision=vision,
            tokenizer=Tokenizer(model_path(setting.data / "tokenizer")),
            dataset=open_data_set(data, setting.data),
            seed=1,
            global_batch=setting.batch,
            micro_batch=setting.batch,
            dp_rank=0,
            dp_size=1,
        )
        if state is not None:
            self._loader.go_on_from(DataState.from_json(state, "benchmark"))

    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        for step in self._loader:
            assert not step.lost
            ((pixels, _),) = step.micro_batches
            yield pixels[:, 0], [name.rpartition("#")[2] for _, name in step.samples]

    def state(self) -> Any:
        return self._loader.state.to_json()


if __name__ == "__main__":
    run(prepare, MegaMoELoader)
