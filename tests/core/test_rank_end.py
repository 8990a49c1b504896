"""The report of how a rank ended: who writes it, and what is not believed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.core.exit_status import FAILED, HUNG, REQUEST_IS_WRONG, STOPPED
from megamoe.core.rank_end import END_VARIABLE, EndKind, RankEnd, read_end, report_end, unfinished_reports
from tests.training import ROOT, small_config, write_config


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(END_VARIABLE, str(tmp_path / "rank-00001.end.json"))
    return tmp_path / "rank-00001.end.json"


def test_what_is_reported_is_what_is_read(path: Path) -> None:
    report_end(HUNG, "rank 1 hangs", phase="waits for data", step=7)
    assert read_end(path, os.getpid()) == RankEnd(EndKind.HUNG, HUNG, "rank 1 hangs", os.getpid(), "waits for data", 7)
    report_end(FAILED, "the port", kind=EndKind.PORT_TAKEN)
    end = read_end(path, os.getpid())
    assert end is not None and end.kind is EndKind.PORT_TAKEN and end.step is None
    assert list(path.parent.iterdir()) == [path], "nothing is left of the writing"


@pytest.mark.parametrize(
    ("status", "kind"),
    [(0, "done"), (1, "failed"), (2, "request_is_wrong"), (75, "stopped"), (143, "stop_failed"), (130, "interrupted")],
)
def test_the_kind_follows_from_the_status(status: int, kind: str, path: Path) -> None:
    report_end(status)
    assert json.loads(path.read_text())["kind"] == kind


def test_without_a_launcher_or_a_folder_nothing_is_written_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(END_VARIABLE, raising=False)
    report_end(HUNG)
    monkeypatch.setenv(END_VARIABLE, "/nowhere/at/all.json")
    report_end(HUNG)


def test_what_is_half_written_or_of_another_process_or_not_ours_is_no_report(path: Path) -> None:
    assert read_end(path, 7) is None
    report_end(REQUEST_IS_WRONG, "wrong")
    whole = path.read_text()
    assert read_end(path, os.getpid() + 1) is None
    for text in (whole[:-5], "", "[]", "7", whole.replace("request_is_wrong", "fine"), whole.replace('"wrong"', "[1]")):
        path.write_text(text)
        assert read_end(path, os.getpid()) is None, text
    path.write_text(whole.replace("}", ', "more": 1}'))
    assert read_end(path, os.getpid()) is None


def rank(folder: Path, *overrides: str, **environment: str) -> tuple[int, RankEnd | None]:
    """Run one rank of `megamoe train`, as a launcher starts it."""
    end = folder / "end.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "megamoe", "train", str(folder / "config.yaml"), *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), END_VARIABLE: str(end), "RANK": "0", "WORLD_SIZE": "1", **environment},
        stderr=subprocess.DEVNULL,
    )
    status = process.wait(120)
    return status, read_end(end, process.pid)


def test_a_rank_reports_a_wrong_request_and_an_error_of_its_own(tmp_path: Path) -> None:
    write_config(tmp_path, small_config()).rename(tmp_path / "config.yaml")
    status, end = rank(tmp_path, "optim.lrr=1")
    assert status == REQUEST_IS_WRONG and end is not None
    assert end.kind is EndKind.REQUEST_IS_WRONG and "optim.lr" in end.message and "\n" not in end.message
    status, end = rank(tmp_path, RANK="zero")
    assert status == FAILED and end is not None
    assert end.kind is EndKind.FAILED and end.message.startswith("ValueError: ")


def test_a_port_that_is_taken_is_a_kind_of_its_own(tmp_path: Path) -> None:
    code = (
        "from megamoe.parallel.deepspeed import process_group\n"
        "from megamoe.core.errors import PortTakenError\n"
        "try:\n  process_group.joined_world().__enter__()\n"
        "except PortTakenError as error:\n  print(error)\n"
    )
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        places = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **places},
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert f"MASTER_PORT {port} is used by another process" in done.stdout, done.stderr


def test_a_rank_that_is_told_to_stop_before_its_first_step_reports_it(path: Path) -> None:
    code = (
        "import time; from megamoe.train.stop_request import StopRequest; StopRequest(1, 5.0);"
        "print('up', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == STOPPED
    end = read_end(path, process.pid)
    assert end is not None and end.kind is EndKind.STOPPED
    assert end.message == "rank 1: SIGTERM before the first step: nothing to save"


def test_what_a_killed_rank_left_of_a_report_is_found_and_a_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rank-00000.end.json"
    half_written = tmp_path / ".rank-00000.end.json.12.34.tmp"
    half_written.touch()
    (tmp_path / ".rank-00001.end.json.12.34.tmp").touch()
    assert unfinished_reports(path) == [half_written]

    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    half_written.unlink()
    monkeypatch.setenv(END_VARIABLE, str(path))
    monkeypatch.setattr(Path, "replace", full)
    report_end(1, "failed")
    assert unfinished_reports(path) == [] and not path.exists()
