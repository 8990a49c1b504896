"""Faults while training: signals, processes that are frozen, steps that fail each time. Real processes and signals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from megamoe.statuses import NO_PROGRESS, STOPPED
from tests.training import ROOT, audit, make_data, metrics, small_config, train, write_config

LAYOUT = ("parallel.pipeline=2", "parallel.expert=2", "train.precision=bf16")
STEPS = 24
EXACT = ("step", "loss", "lm_loss", "aux_loss", "z_loss", "grad_norm", "lr", "tokens", "samples", "load")


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


def _exact(run: Path) -> list[tuple[Any, ...]]:
    return [tuple(row[key] for key in EXACT) for row in metrics(run)]


def _saved(run: Path) -> list[int]:
    assert not list(run.glob("checkpoints/.incomplete-*"))
    return sorted(int(path.name[5:]) for path in run.glob("checkpoints/step-*"))


def test_stopped_by_a_signal_and_then_frozen_it_ends_as_the_undisturbed_run(folder: Path) -> None:
    rng = random.Random(7)
    train(folder, "whole", 4, LAYOUT)

    with launched(folder, "disturbed", 4, *LAYOUT) as one:
        one.until_step(3)
        os.kill(one.rank(rng.randrange(4)), signal.SIGTERM)
        status, said = one.end()
    run = one.run
    assert status == STOPPED, said
    stopped_at = metrics(run)[-1]["step"]
    assert _saved(run) == [stopped_at] and 3 < stopped_at < 12
    assert f"saved at step {stopped_at}; go on with: megamoe train config.yaml --nproc 4 --resume auto" in said
    assert len(list(run.glob("logs/attempt-*"))) == 1, "it was started again"

    with launched(folder, "disturbed", 4, *LAYOUT) as two:
        two.until_step(stopped_at + 2)
        frozen = rng.randrange(4)
        os.kill(two.rank(frozen), signal.SIGSTOP)
        status, said = two.end()
    assert status == 0, said
    assert f"rank {frozen} is stopped (its main process" in said
    assert "hangs in step" in said and "restart 1 of at most 3" in said
    assert _exact(run) == _exact(folder / "runs/whole")
    assert audit(run) == audit(folder / "runs/whole")


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
    assert _saved(run.run)[-1] == done > before


def _data_worker(rank: int) -> psutil.Process:
    """The fork server's child."""
    family = psutil.Process(rank).children(recursive=True)
    (worker,) = [process for process in family if process.ppid() != rank]
    return worker


def test_ctrl_c_during_a_save_lets_it_finish_and_all_that_was_done_is_saved(folder: Path) -> None:
    with launched(folder, "saving", 1, "checkpoint.every=1") as run:
        run.until_step(2)
        run.until(lambda: bool(list(run.run.glob("checkpoints/.incomplete-*"))))
        run.process.send_signal(signal.SIGINT)
        status, said = run.end()
    assert status == STOPPED, said
    assert "SIGINT: the ranks save and stop" in said
    done = metrics(run.run)[-1]["step"]
    assert _saved(run.run) == list(range(1, done + 1))


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
    assert status == 130 and time.monotonic() - started < 5
    assert "without a save; there is no new checkpoint; go on with" in said
    assert not psutil.pid_exists(rank)


def test_a_rank_that_cannot_save_in_time_ends_itself(folder: Path) -> None:
    """Two ranks, one of them frozen; the other is asked to stop while it waits in a collective."""
    with launched(folder, "late", 2, "parallel.expert=2", "launch.stop_grace=1", "train.watchdog_seconds=60") as run:
        run.until_step(2)
        os.kill(run.rank(1), signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(run.rank(0), signal.SIGTERM)
        status, said = run.end()
    assert status == 143, said
    assert "could not save within launch.stop_grace 1 s" in said
    assert len(list(run.run.glob("logs/attempt-*"))) == 1, "it was started again"


def test_a_signal_in_start_up_ends_the_run_with_nothing_to_save(folder: Path) -> None:
    with launched(folder, "early", 2, "parallel.expert=2") as run:
        run.until(lambda: (run.run / "tokenizer.model").exists())
        os.kill(run.rank(1), signal.SIGTERM)
        status, said = run.end()
    assert status == STOPPED, said
    assert not (run.run / "metrics.jsonl").exists() and "nothing was lost" in said


def test_a_step_that_fails_each_time_is_not_retried_for_ever(folder: Path) -> None:
    diverge = ("optim.name=sgd", "optim.lr=1e38", "optim.clip=0", "optim.warmup=0")
    with launched(folder, "nan", 1, *diverge, "launch.max_restarts_without_progress=1") as run:
        status, said = run.end()
    assert status == NO_PROGRESS, said
    assert "no progress: a restart came no further than step 1 (rank 0 ended with status 1, then rank 0" in said
    assert len(list(run.run.glob("logs/attempt-*"))) == 2
