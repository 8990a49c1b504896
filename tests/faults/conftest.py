"""Data for the tests of faults, drawn once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.training import make_data


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and five training shards of 70, 70, 70, 70 and 20 samples. Not to be changed."""
    folder = tmp_path_factory.mktemp("drawn")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def folder(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy for the runs of one module, which may spoil it."""
    return shutil.copytree(drawn, tmp_path_factory.mktemp("runs") / "here")
