"""The watchdog on real processes: what is a hang, what is none, and what is written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megamoe.core.exit_status import HUNG
from megamoe.core.rank_end import END_VARIABLE, EndKind, read_end
from tests.training import ROOT

START = "import ctypes, time; from megamoe.train.watchdog import Watchdog; w = Watchdog(3, 1.0); w.started();"


def start(log: Path, code: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MEGAMOE_LOG": str(log), END_VARIABLE: str(log) + ".end"}
    return subprocess.Popen(
        [sys.executable, "-c", START + code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_hang_ends_with_its_status_and_the_log_says_where(tmp_path: Path) -> None:
    process = start(tmp_path / "log", "w.enter('waits for data', 7); time.sleep(60)")
    assert process.wait(20) == HUNG
    log = (tmp_path / "log").read_text()
    assert 'File "<string>", line 1' in log and "most recent call first" in log
    assert "megamoe: rank 3 hangs in step 7: waits for data; no progress for 1 s" in log
    assert process.stderr is not None and process.stderr.read() == "", "the terminal of rank 0 is for people"
    end = read_end(tmp_path / "log.end", process.pid)
    assert end is not None and (end.kind, end.status, end.phase, end.step) == (EndKind.HUNG, HUNG, "waits for data", 7)
    assert f"megamoe: {end.message}\n" in log


def test_a_hang_that_holds_the_interpreter_lock_ends_too(tmp_path: Path) -> None:
    process = start(tmp_path / "log", "w.enter('computes', 7); time.sleep(0.2); ctypes.PyDLL(None).sleep(60)")
    assert process.wait(20) == 1
    assert "most recent call first" in (tmp_path / "log").read_text()
    assert not (tmp_path / "log.end").exists(), "no thread was left that could report"


def test_slow_but_steady_is_no_hang_and_saving_has_more_time(tmp_path: Path) -> None:
    code = "[(w.enter('computes', n), time.sleep(0.5)) for n in range(4)]; w.enter('saves', 4, slow=True); time.sleep(2)"
    assert start(tmp_path / "log", code).wait(20) == 0
    assert (tmp_path / "log").read_text() == ""


def test_a_process_that_was_stopped_and_goes_on_has_not_hung(tmp_path: Path) -> None:
    process = start(tmp_path / "log", "w.enter('computes', 1); print('up', flush=True); time.sleep(0.5); print('on')")
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    assert process.wait(20) == 0 and process.stdout.read() == "on\n"


def test_sigusr2_writes_the_stacks_and_the_process_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path / "log", "print('up', flush=True); time.sleep(0.7)")
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGUSR2)
    assert process.wait(20) == 0
    assert "most recent call first" in (tmp_path / "log").read_text()
