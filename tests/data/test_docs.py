"""Every example of docs/data.md runs as it is written."""

from __future__ import annotations

import re
import shlex
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

from data_tools.verbs.synth import synthesize
from megamoe.commands.data.group import data
from megamoe.config.load import parse_config

PAGE = Path(__file__).parents[2] / "docs/data.md"


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGAMOE_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_every_python_example_runs(folder: Path) -> None:
    synthesize(folder / "shapes", samples=600, seed=0, shard_size=100, validation=10)
    names: dict[str, Any] = {"__name__": "page"}
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"{PAGE}, python block {number}", "exec"), names)
    settings = SimpleNamespace(
        train_data="shapes/train", batch_size=8, world_size=1, rank=0, seed=3, workers=2, train_num_samples=100
    )
    loader = names["get_wds_dataset"](settings, lambda image: torch.zeros(3, *image.size), lambda text: [text])
    passes = [[text for _, texts in loader for text in texts] for _ in range(2)]
    assert isinstance(passes[0][0], str) and [len(each) for each in passes] == [loader.num_samples] * 2 == [112, 112]
    assert passes[0] != passes[1]


def test_every_command_runs_in_the_order_of_the_page(folder: Path) -> None:
    commands = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    for program, group, *arguments in commands:
        assert (program, group) == ("megamoe", "data")
        if arguments[0] not in ("synth", "tokenizer"):
            arguments += ["--processes", "1"]  # starting processes is not what is tested
        result = CliRunner().invoke(data, arguments, catch_exceptions=False)
        assert result.exit_code == 0, (arguments, result.output)
        if arguments[0] == "synth":
            pictures(folder / "shapes/train/00000.tar", folder / "pictures")
    assert {command[2] for command in commands} == set(data.list_commands(click.Context(data))), "each verb has its example"


def pictures(shard: Path, folder: Path) -> None:
    """Make a folder of pictures to build shards from."""
    folder.mkdir()
    with tarfile.open(shard) as tar:
        for info in tar.getmembers()[:60]:
            (folder / info.name).write_bytes(tar.extractfile(info).read())  # type: ignore[union-attr]
    with Image.open(next(folder.glob("*.jpg"))) as image:
        image.verify()


def test_the_settings_of_the_page_are_settings() -> None:
    for block in blocks("yaml"):
        assert len(parse_config(yaml.safe_load(block), source="page").data.train) == 2


def test_links_of_the_page_lead_somewhere() -> None:
    text = PAGE.read_text()
    anchors = {re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.removeprefix("#") in anchors if target.startswith("#") else (PAGE.parent / target).exists(), target
