"""The progress line with and without a terminal."""

from __future__ import annotations

import pytest

from megamoe.metrics import Progress
from megamoe.metrics.progress_bar import TERMINAL_VARIABLE


def record(step: int, loss: float = 2.0) -> dict[str, object]:
    return {"step": step, "loss": loss, "tokens_per_second": 12345.0}


def test_without_a_terminal_plain_lines_come_now_and_then_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(steps=1500, interval=1000)
    for step in range(1, 1501):
        progress.update(record(step))
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step 1/1500, loss 2.0000, 12.3k tokens/s, ")
    assert lines[1] == "step 1500/1500, loss 2.0000, 12.3k tokens/s, 00:00 left"


def test_time_left_after_a_resume_counts_the_steps_of_this_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 102.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    progress = Progress(steps=100, done=60)
    progress.update(record(61))
    assert "01:18 left" in capsys.readouterr().err


def test_a_rank_whose_launcher_has_a_terminal_draws_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TERMINAL_VARIABLE, "1")
    progress = Progress(steps=10, done=4)
    for step in range(5, 11):
        progress.update(record(step, loss=1 / step))
    progress.close()
    error = capsys.readouterr().err
    assert error.count("\r") >= 2 and error.endswith("\n")
    assert "step 10/10" in error.split("\r")[-1] and "loss 0.1000, 12.3k tokens/s" in error
