"""Fixtures of the data plane's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.sample.vocabulary import train_tokenizer
from tests.data.shard_factory import caption


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a small vocabulary on the captions that the factory writes."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_tokenizer([caption(n) for n in range(200)], path, 320)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    """Load that vocabulary."""
    return Tokenizer(tokenizer_path)
