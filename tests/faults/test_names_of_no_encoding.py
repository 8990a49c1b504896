"""Shards whose file names are no UTF-8, as old archives have them: trained on, resumed, named, and taken by every tool."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.training import audit, make_data, megamoe, small_config, train, write_config

NAME = os.fsdecode(b"caf\xe9-1.tar")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    make_data(folder)
    (folder / "shards/train/00001.tar").rename(folder / "shards/train" / NAME)
    write_config(folder, small_config(data={"bad_shards": "quarantine", "shuffle_shards": 5}))
    return folder


def test_a_run_reads_resumes_and_names_them(folder: Path) -> None:
    train(folder, "run", 2, ["train.steps=5"])
    train(folder, "run", 1, ["train.steps=10"], resume="auto")
    assert {step for step, _, name in audit(folder / "runs/run") if name.startswith(f"{NAME}#")} >= {1, 10}


def test_a_bad_one_is_left_out_and_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes((folder / "shards/train" / NAME).read_bytes()[:50_000])
    train(folder, "bad", 1, [f"data.train=[shards/train/0*.tar, {tmp_path}]"])
    (line,) = (folder / "runs/bad/lost/shards.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["shard"] == NAME and "truncated at byte 50000" in json.loads(line)["reason"]


@pytest.mark.parametrize(
    "verb",
    [
        ("index",), ("validate",), ("checksum",), ("stats", "--out", "out"), ("dedup", "out"), ("repair", "out"),
        ("filter", "out", "--min-size", "1"), ("split", "out", "--shares", "0.5,0.5"),
        ("reshard", "out", "--shard-size", "90"),
    ],
)  # fmt: skip
def test_every_tool_takes_them(verb: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    name, *rest = verb
    megamoe("data", name, str(folder / "shards/train"), *rest, folder=tmp_path)
