"""Determinism and recovery: the same command, a killed worker, another layout. Real processes, killed with SIGKILL."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megamoe.core.exit_status import STOPPED
from tests.faults.launched import launched, saved
from tests.training import ROOT, audit, largest_difference, make_data, metrics, small_config, train, write_config

LAYOUT = ("parallel.pipeline=2", "parallel.expert=2", "data.workers=1", "train.precision=bf16")
EXACT = ("step", "loss", "lm_loss", "aux_loss", "z_loss", "grad_norm", "lr", "tokens", "samples", "load")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and an undisturbed run called ``whole`` of 24 steps."""
    path = tmp_path_factory.mktemp("resume")
    make_data(path)
    write_config(
        path,
        small_config(
            train={"steps": 24},
            optim={"name": "adamw", "lr": 3e-3, "clip": 0.5, "weight_decay": 0.1},
            checkpoint={"every": 4, "keep": 10},
            launch={"max_restarts": 3},
        ),
    )
    train(path, "whole", 4, LAYOUT)
    return path


def _exact(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(row[key] for key in EXACT) for row in rows]


def test_the_same_command_twice_gives_identical_metrics(folder: Path) -> None:
    again = train(folder, "again", 4, LAYOUT)
    assert _exact(again) == _exact(metrics(folder / "runs/whole"))
    assert audit(folder / "runs/again") == audit(folder / "runs/whole")


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_killed_at_a_random_step_and_resumed_gives_identical_metrics(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    run = folder / "runs" / f"killed-{seed}"
    at_step, victim = rng.randrange(2, 14), rng.randrange(4)
    command = [sys.executable, "-m", "megamoe", "train", "config.yaml", "--nproc", "4", "--resume", "auto"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, f"run.name={run.name}", *LAYOUT], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        _wait_for(run / "metrics.jsonl", lines=at_step, process=process)
        (pids,) = run.glob("logs/*/pids.json")
        os.kill(json.loads(pids.read_text())[str(victim)], signal.SIGKILL)
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert len(list(run.glob("logs/*/pids.json"))) == 2, "the launcher has not restarted the ranks"
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert _exact(rows) == _exact(metrics(folder / "runs/whole"))
    assert audit(run) == audit(folder / "runs/whole")


@pytest.mark.nightly  # each on its own, on fewer ranks: test_chaos.py
def test_stopped_by_a_signal_and_then_frozen_it_ends_as_the_undisturbed_run(folder: Path) -> None:
    rng = random.Random(7)
    settings = (*LAYOUT, "data.workers=0", "train.watchdog_seconds=6")
    with launched(folder, "disturbed", 4, *settings) as one:
        one.until_step(3)
        os.kill(one.rank(rng.randrange(4)), signal.SIGTERM)
        status, said = one.end()
    run = one.run
    assert status == STOPPED, said
    stopped_at = metrics(run)[-1]["step"]
    assert saved(run)[-1] == stopped_at < 24, "it has not stopped"
    assert f"saved at step {stopped_at}; go on with: megamoe train config.yaml --nproc 4 --resume auto" in said
    assert len(list(run.glob("logs/attempt-*"))) == 1, "it was started again"

    with launched(folder, "disturbed", 4, *settings) as two:
        two.until_step(stopped_at + 2)
        frozen = rng.randrange(4)
        os.kill(two.rank(frozen), signal.SIGSTOP)
        status, said = two.end()
    assert status == 0, said
    assert f"rank {frozen} is stopped (its main process" in said
    assert "hangs in step" in said and "restart 1 of at most 3" in said
    assert _exact(metrics(run)) == _exact(metrics(folder / "runs/whole"))
    assert audit(run) == audit(folder / "runs/whole")


@pytest.mark.parametrize(
    ("nproc", "layout"),
    [
        (2, ("parallel.expert=2", "parallel.zero=3")),
        (3, ("parallel.pipeline=3",)),
        (4, ("parallel.expert=4", "parallel.zero=2")),
    ],
)
def test_a_checkpoint_goes_on_under_another_layout(folder: Path, nproc: int, layout: tuple[str, ...]) -> None:
    name = f"moved-{nproc}-" + "-".join(layout).replace("parallel.", "").replace("=", "")
    source = folder / "runs" / "fp32" / "checkpoints" / "step-00000008"
    if not source.exists():
        train(folder, "fp32", 4, (*LAYOUT, "train.precision=fp32"))
    rows = train(folder, name, nproc, layout, resume=str(source), config=_fp32_config(folder))
    difference, where = largest_difference(metrics(folder / "runs/fp32")[8:], rows)
    assert difference <= 1e-5, where


def _fp32_config(folder: Path) -> str:
    write_config(
        folder,
        small_config(train={"steps": 24}, optim={"name": "adamw", "lr": 3e-3, "clip": 0.5, "weight_decay": 0.1}),
        "fp32.yaml",
    )
    return "fp32.yaml"


def _wait_for(path: Path, lines: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "ended before it was killed"
        if path.exists() and path.read_text().count("\n") >= lines:
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} had no {lines} lines within 120 s")
