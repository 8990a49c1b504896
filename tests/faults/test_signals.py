"""Faults while training: signals, processes that are frozen, steps that fail each time. Real processes and signals."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from megamoe.core.exit_status import NO_PROGRESS, STOPPED
from tests.faults.launched import launched, saved
from tests.training import make_data, metrics, small_config, write_config

STEPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and a config: checkpoints every 12 steps, and hangs that are noticed after 6 s."""
    path = tmp_path_factory.mktemp("signals")
    make_data(path)
    write_config(
        path,
        small_config(
            train={"steps": STEPS, "watchdog_seconds": 6},
            optim={"name": "adamw", "lr": 3e-3, "clip": 0.5, "weight_decay": 0.1},
            checkpoint={"every": 12, "keep": 100},
            launch={"max_restarts": 3},
        ),
    )
    return path


def test_a_frozen_data_worker_leaves_stacks_in_the_log_and_the_run_goes_on(folder: Path) -> None:
    with launched(folder, "worker", 1, "data.workers=1", "train.steps=100000") as run:
        run.until_step(13)
        worker = _data_worker(run.rank(0))
        worker.suspend()
        run.until(lambda: (run.run / "logs/attempt-2/pids.json").exists())
        before = metrics(run.run)[-1]["step"]
        run.until(lambda: (run.run / "metrics.jsonl").read_text().count("\n") > before)
        # As a batch system does before the time limit: to every process of the task, the data workers and theirs too.
        os.killpg(run.rank(0), signal.SIGUSR1)
        status, said = run.end()
    assert f"rank 0 is stopped (its process {worker.pid}" in said
    assert "hangs in step" in said and "restart 1 of at most 3" in said
    log = (run.run / "logs/attempt-1/rank-00000.log").read_text()
    assert "waits for its part of the data" in log and "most recent call first" in log and "_receive" in log
    assert status == STOPPED, said
    done = metrics(run.run)[-1]["step"]
    assert [row["step"] for row in metrics(run.run)] == list(range(1, done + 1))
    assert saved(run.run)[-1] == done > before


def _data_worker(rank: int) -> psutil.Process:
    """The child of the process from which workers are forked."""
    family = psutil.Process(rank).children(recursive=True)
    (worker,) = [process for process in family if process.ppid() != rank]
    return worker


def test_ctrl_c_during_a_save_lets_it_finish_and_all_that_was_done_issaved(folder: Path) -> None:
    with launched(folder, "saving", 1, "checkpoint.every=1") as run:
        run.until_step(2)
        run.until(lambda: bool(list(run.run.glob("checkpoints/.incomplete-*"))))
        run.process.send_signal(signal.SIGINT)
        status, said = run.end()
    assert status == STOPPED, said
    assert "SIGINT: the ranks save and stop" in said
    done = metrics(run.run)[-1]["step"]
    assert saved(run.run) == list(range(1, done + 1))


def test_ctrl_c_twice_ends_at_once_without_a_save(folder: Path) -> None:
    with launched(folder, "twice", 1, "train.steps=100000") as run:
        run.until_step(2)
        rank = run.rank(0)
        os.kill(rank, signal.SIGSTOP)  # it cannot save
        run.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert run.process.poll() is None
        run.process.send_signal(signal.SIGINT)
        started = time.monotonic()
        status, said = run.end()
    assert status == 130 and time.monotonic() - started < 15
    assert "without a save; there is no new checkpoint; go on with" in said
    assert not psutil.pid_exists(rank)


def test_a_signal_in_start_up_ends_the_run_with_nothing_to_save(folder: Path) -> None:
    with launched(folder, "early", 2, "parallel.expert=2") as run:
        run.until(lambda: (run.run / "tokenizer.model").exists())
        os.kill(run.rank(1), signal.SIGTERM)
        status, said = run.end()
    assert status == STOPPED, said
    assert not (run.run / "metrics.jsonl").exists() and "nothing was lost" in said


def test_a_step_that_fails_each_time_is_not_retried_for_ever(folder: Path) -> None:
    diverge = ("optim.name=sgd", "optim.lr=1e38", "optim.clip=0", "optim.warmup=0", "train.max_skipped=0")
    with launched(folder, "nan", 1, *diverge, "launch.max_restarts_without_progress=1") as run:
        status, said = run.end()
    assert status == NO_PROGRESS, said
    assert "no progress: a restart came no further than step 1 (rank 0 ended with status 1, then rank 0" in said
    assert len(list(run.run.glob("logs/attempt-*"))) == 2
