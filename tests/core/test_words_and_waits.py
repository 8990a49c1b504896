"""Exit statuses in words, waits between tries, and children that end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamoe.core.exit_status import how_it_ended, signal_name
from megamoe.core.retry import Backoff
from tests.training import ROOT


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "ended with status 0"),
        (1, "ended with status 1"),
        (143, "ended with status 143"),
        (-9, "was killed by SIGKILL"),
        (-signal.SIGRTMIN - 1, f"was killed by signal {signal.SIGRTMIN + 1}"),
    ],
)
def test_an_exit_status_in_words(status: int, words: str) -> None:
    assert how_it_ended(status) == words
    assert signal_name(signal.SIGTERM) == "SIGTERM"


def test_waits_double_up_to_a_bound_and_heed_what_is_asked() -> None:
    backoff = Backoff(first=15.0, longest=600.0)
    assert [backoff.wait(failures) for failures in range(1, 9)] == [15, 30, 60, 120, 240, 480, 600, 600]
    assert backoff.wait(10_000) == 600
    assert backoff.wait(1, asked=100.0) == 100 and backoff.wait(1, asked=9_000.0) == 600


def test_jitter_shortens_a_wait_by_its_share_at_most() -> None:
    waits = {Backoff(first=1.0, longest=60.0, jitter=0.5).wait(3) for _ in range(200)}
    assert min(waits) >= 2.0 and max(waits) <= 4.0 and len(waits) > 100


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    child = (
        "import os, pathlib, sys, time; from megamoe.core.child import end_with_parent;"
        "end_with_parent(lambda: os.read(0, 1), pathlib.Path(sys.argv[1]).touch); print('up', flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys, time;"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}, sys.argv[1]], stdin=-1, stdout=-1);"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent, str(tmp_path / "before")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert _alive(pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while _alive(pid):
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.02)
    assert (tmp_path / "before").exists()
