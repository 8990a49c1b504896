"""Settings of all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
# These start daemons or networks of the whole machine: all tests of the folder run one after the other.
ONE_AT_A_TIME = ("slurm", "network")
# What takes longest begins first, so that no worker is left alone with it at the end.
LONGEST = ("slurm", "faults", "gpu", "parity", "network", "launcher", "demo", "data", "data_tools")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Share the tests out by file: the data and the runs of a module are made once."""
    for item in items:
        path = item.path.relative_to(TESTS)
        group = path.parts[0] if path.parts[0] in ONE_AT_A_TIME else str(path)
        item.add_marker(pytest.mark.xdist_group(group))
    places = {folder: place for place, folder in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.relative_to(TESTS).parts[0], len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are tiny here: handing them to several threads costs more than the work itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
