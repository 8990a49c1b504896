"""Fixtures of the tests of evaluation: a run that was really trained, and held-out shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.shard_factory import jpeg, write_tar
from tests.training import megamoe, small_config, train, write_config

LEARNT = "a red square"  # the one caption of the training shards
LONG = "a blue circle " * 30  # longer than a sequence


def shard(path: Path, captions: list[str], first: int = 0) -> Path:
    """A shard with a picture for each caption."""
    members = []
    for n, caption in enumerate(captions, start=first):
        members += [(f"{n:05d}.jpg", jpeg(n)), (f"{n:05d}.txt", caption.encode())]
    return write_tar(path, members)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt to say :data:`LEARNT` of any picture."""
    folder = tmp_path_factory.mktemp("evaluate")
    shard(folder / "train/00000.tar", [LEARNT] * 64)
    shard(folder / "words/00000.tar", [LEARNT, LONG, "a green star at the top"] * 5)
    megamoe("data", "tokenizer", "words", "tokenizer", "--vocab-size", "300", folder=folder)
    config = small_config(
        model={"vision": {"depth": 2}, "decoder": {"depth": 2}, "moe": {"experts": 4}},
        data={"train": "train", "tokenizer": str(folder / "tokenizer.model"), "sequence_length": 64, "audit": False},
        train={"steps": 30, "global_batch": 2},
        optim={"name": "adamw", "lr": 5e-3, "clip": 1.0},
        checkpoint={"every": 30},
    )
    write_config(folder, config)
    train(folder, "learnt", 1)
    return folder / "runs/learnt"


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six samples with the learnt caption, four others, one cut picture, one sample without a caption."""
    folder = tmp_path_factory.mktemp("held-out")
    shard(folder / "00000.tar", [LEARNT] * 6, first=100)
    members = []
    for n, caption in enumerate(["a red squar", "A red square", "a red square at the top", LONG], start=200):
        members += [(f"{n:05d}.jpg", jpeg(n)), (f"{n:05d}.txt", caption.encode())]
    members += [("00300.jpg", jpeg(300)[:200]), ("00300.txt", LEARNT.encode()), ("00301.jpg", jpeg(301))]
    write_tar(folder / "00001.tar", members)
    return folder
