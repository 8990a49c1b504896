"""A real SLURM for the tests that need one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.bed import why_not
from tests.slurm.jobs import BedWithJobs


@pytest.fixture(scope="session")
def slurm_here() -> None:
    """Skips, with the reason, where no SLURM can be started."""
    if reason := why_not():
        pytest.skip(f"no SLURM test bed here: {reason}")


@pytest.fixture(scope="session")
def session_bed(slurm_here: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BedWithJobs]:
    bed = BedWithJobs(tmp_path_factory.mktemp("bed"))
    bed.up(nodes=4)
    yield bed
    bed.down()


@pytest.fixture
def bed(session_bed: BedWithJobs) -> Iterator[BedWithJobs]:
    """A SLURM of four nodes, all idle. Afterwards the jobs of the test are gone and its dead nodes are back."""
    yield session_bed
    session_bed.run("scancel", "--user", str(os.getuid()), "--full", "--signal=KILL", check=False)
    session_bed.run("scancel", "--user", str(os.getuid()))
    for node in session_bed.nodes:
        if not session_bed.alive(node):
            session_bed.start_node(node)
    session_bed.wait_nodes(lambda states: set(states.values()) == {"idle"}, timeout=60)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """An empty file for a batch script."""
    return tmp_path / "job.sh"
