"""A training that runs while a test does something to its processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.training import ROOT


class Launched:
    """A `megamoe train` that runs, and its ranks."""

    def __init__(self, process: subprocess.Popen[str], run: Path) -> None:
        self.process, self.run = process, run

    def rank(self, rank: int) -> int:
        """Process id of a rank of the newest attempt."""
        newest = max(self.run.glob("logs/*/pids.json"), key=lambda path: int(path.parent.name[8:]))
        pid: int = json.loads(newest.read_text())[str(rank)]
        return pid

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for ``condition``; the run must not end meanwhile."""
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, f"ended too early: {self.process.communicate()[1]}"
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.002)

    def until_step(self, step: int) -> None:
        """Wait until ``step`` is in the metrics."""
        path = self.run / "metrics.jsonl"
        self.until(lambda: path.exists() and path.read_text().count("\n") >= step)

    def end(self) -> tuple[int, str]:
        """Exit status of the launcher and what it said."""
        _, said = self.process.communicate(timeout=120)
        return self.process.returncode, said


@contextmanager
def launched(folder: Path, name: str, nproc: int, *overrides: str) -> Iterator[Launched]:
    command = [sys.executable, "-m", "megamoe", "train", "config.yaml", "--nproc", str(nproc), "--resume", "auto"]
    process = subprocess.Popen(
        [*command, f"run.name={name}", *overrides],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Launched(process, folder / "runs" / name)
    finally:
        process.kill()


def saved(run: Path) -> list[int]:
    """Steps of the checkpoints, of which none may be half written."""
    assert not list(run.glob("checkpoints/.incomplete-*"))
    return sorted(int(path.name[5:]) for path in run.glob("checkpoints/step-*"))
