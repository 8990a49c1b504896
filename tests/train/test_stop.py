"""Being asked to stop, on real processes: in start-up, later, in a call that never returns, and twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from megamoe.core.exit_status import STOP_FAILED, STOP_SIGNALS, STOPPED, STOPPED_TWICE
from tests.training import ROOT

START = "import ctypes, time; from megamoe.train.stop_request import StopRequest; stop = StopRequest(3, 1.0);"
NEVER_RETURNS = "print('up', flush=True); [ctypes.CDLL(None).sleep(9) for _ in range(9)]"
"""In C, as in a collective whose peer hangs: hardly an instruction of Python's runs."""


def start(code: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", f"{START}{code}"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_in_start_up_there_is_nothing_to_wait_for(signum: signal.Signals) -> None:
    process = start(NEVER_RETURNS)
    process.send_signal(signum)
    _, said = process.communicate(timeout=20)
    assert process.returncode == STOPPED
    assert said == f"megamoe: rank 3: {signum.name} before the first step: nothing to save\n"


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_later_it_is_noted_for_the_training_loop(signum: signal.Signals) -> None:
    process = start("stop.started(); print('up', flush=True)\nwhile not stop.asked: time.sleep(0.01)")
    process.send_signal(signum)
    assert process.wait(20) == 0


def test_a_rank_that_cannot_save_in_time_ends_itself_whatever_it_waits_in() -> None:
    process = start("stop.started();" + NEVER_RETURNS)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)  # the same again: it changes nothing
    _, said = process.communicate(timeout=20)
    assert process.returncode == STOP_FAILED
    assert time.monotonic() - started >= 1
    assert "could not save within launch.stop_grace 1 s" in said


def test_a_second_ctrl_c_does_not_wait() -> None:
    process = start("stop.started();" + NEVER_RETURNS)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == STOPPED_TWICE
