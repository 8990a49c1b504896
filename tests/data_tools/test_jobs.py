"""The pool of this machine: order, errors with their job, workers that are killed, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_tools.distribute.jobs import map_jobs
from megamoe.core.errors import UserError
from tests.data_tools import work

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_the_order_of_the_jobs_each_with_its_job(processes: int) -> None:
    found = list(map_jobs(work.square, range(50), label="square", processes=processes))
    assert found == [(n, n * n) for n in range(50)]


def test_two_processes_share_the_work() -> None:
    pids = {pid for _, (_, pid) in map_jobs(work.square_by, range(20), label="square", processes=2)}
    assert len(pids) == 2 and os.getpid() not in pids


def test_no_jobs_are_no_results() -> None:
    assert list(map_jobs(work.square, [], label="square")) == []
    assert list(map_jobs(work.square, [], label="square", cluster="tcp://127.0.0.1:1")) == []


def test_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    for n in (0, 5, 6, 19):
        (tmp_path / str(n)).touch()
    found = [result for _, result in map_jobs(work.die_once, [(n, tmp_path) for n in range(20)], label="x", processes=2)]
    assert found == [n * n for n in range(20)] and not list(tmp_path.iterdir())


def test_a_job_that_kills_every_worker_is_named() -> None:
    found = []
    with pytest.raises(UserError, match=r"^number 7: 3 workers died .*SIGKILL, .* when memory runs out.*--processes"):
        for n, _ in map_jobs(work.die_at_7, range(20), label="try", unit="number", processes=2):
            found.append(n)
    assert found == list(range(7))


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_is_raised_here_and_names_its_job(processes: int) -> None:
    with pytest.raises(ValueError, match="not a number that I like") as caught:
        list(map_jobs(work.fail_at_3, range(9), label="try", unit="number", processes=processes))
    assert caught.value.__notes__[-1] == "This was try, number 3"
    assert processes == 1 or "in fail_at_3" in caught.value.__notes__[0]


def test_an_error_that_cannot_be_sent_is_told_in_words() -> None:
    with pytest.raises(RuntimeError, match="TwoPartError: number: 0"):
        list(map_jobs(work.fail_oddly, range(2), label="try", processes=2))


def test_whoever_wants_no_more_results_waits_for_no_job(tmp_path: Path) -> None:
    results = map_jobs(work.square_by, range(10_000), label="square", processes=2)
    pids = {next(results)[1][1] for _ in range(20)}
    began = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 10 and not any(_alive(pid) for pid in pids)


def test_ctrl_c_ends_at_once_with_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with _slow_command(tmp_path) as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
        began = time.monotonic()
        _, said = process.communicate(timeout=20)
        assert time.monotonic() - began < 15
    assert process.returncode == 130
    assert said.strip().splitlines() == ["megamoe: interrupted"]
    assert _gone(process.pid) and not list(tmp_path.glob(".made-*")) and not list(tmp_path.glob("made-*"))


def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    with _slow_command(tmp_path) as process:
        process.kill()
        _, said = process.communicate(timeout=20)  # which ends only when no worker holds stderr any more
    assert _gone(process.pid) and "Traceback" not in said
    assert not list(tmp_path.glob(".made-*"))


@contextmanager
def _slow_command(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a command whose two workers are in the middle of a job, in its own session, as a terminal does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.data_tools.work", str(folder)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 30
        while len(list(folder.glob("started-*"))) < 2:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def _gone(session: int) -> bool:
    """Return whether all processes of this session end within some seconds."""
    until = time.monotonic() + 6
    while time.monotonic() < until:
        left = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(of) == session and state != "Z":
                left.append(stat)
        if not left:
            return True
        time.sleep(0.05)
    return False
