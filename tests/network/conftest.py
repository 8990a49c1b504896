"""Networks for tests, and runs on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.network.hosts import Host, Network, network
from tests.training import ROOT, make_data, small_config, write_config

SUPERVISOR = Path(__file__).parent / "supervisor.py"
STEPS = 8


def new_network(count: int) -> Iterator[Network]:
    try:
        with network(count) as made:
            yield made
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"hosts on one machine need root and network namespaces: {error}")


@pytest.fixture
def two() -> Iterator[Network]:
    """Two hosts."""
    yield from new_network(2)


@pytest.fixture
def three() -> Iterator[Network]:
    """Three hosts."""
    yield from new_network(3)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a config of two nodes whose hangs are noticed after 6 s."""
    path = tmp_path_factory.mktemp("network")
    make_data(path)
    launch = {"nodes": 2, "node_timeout": 60.0, "max_restarts": 3, "health": {"check": "quick"}}
    train = {"steps": STEPS, "watchdog_seconds": 6}
    write_config(path, small_config(train=train, checkpoint={"every": 3}, launch=launch))
    return path


class HostRun:
    """A run under a supervisor on the first host."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process, self.folder = process, folder

    def events(self, event: str) -> list[dict[str, Any]]:
        path = self.folder / "launch/events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [each for each in map(json.loads, lines) if each["event"] == event]

    def steps(self) -> int:
        path = self.folder / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            assert self.process.poll() is None, f"ended too early: {self.process.communicate()[1]}"
            assert time.monotonic() < deadline, (self.folder / "launch/events.jsonl").read_text()
            time.sleep(0.005)

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=240)
        return self.process.returncode, said


@contextmanager
def supervised(
    hosts: Sequence[Host], folder: Path, name: str, *overrides: str, command: Sequence[str] = ()
) -> Iterator[HostRun]:
    """Node n1 is the first of ``hosts``, and so on."""
    run = folder / "runs" / name
    run.mkdir(parents=True)
    nodes = {f"n{number}": host.pid for number, host in enumerate(hosts, 1)}
    spec = {"hosts": nodes, "command": list(command) or [sys.executable, "-m", "megamoe"]}
    settings = [f"run.dir={run}", *overrides]
    process = hosts[0].start(
        [sys.executable, str(SUPERVISOR), str(run), str(folder / "config.yaml"), json.dumps(spec), *settings],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TEST_RUN": str(run)},
        cwd=folder,
        stderr=subprocess.PIPE,
    )
    with process:
        try:
            yield HostRun(process, run)
        finally:
            process.kill()
