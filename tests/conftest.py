"""Settings of all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

TESTS = Path(__file__).parent
# These start daemons or networks of the whole machine: all tests of the folder run one after the other.
ONE_AT_A_TIME = ("slurm", "network")
# What takes longest begins first, so that no worker is left alone with it at the end.
LONGEST = ("slurm", "faults", "gpu", "parity", "network", "launcher", "demo", "data", "data_tools")


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """Share the tests out by file, so that the data and the runs of a module are made once."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        folder = Path(file).parts[1]
        return folder if folder in ONE_AT_A_TIME else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """Use it when pytest-xdist runs the tests (``-n``)."""
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest first."""
    places = {folder: place for place, folder in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.relative_to(TESTS).parts[0], len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are tiny here: handing them to several threads costs more than the work itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
