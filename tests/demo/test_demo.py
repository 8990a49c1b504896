"""The demo's own part: it shows its commands, kills a worker, judges the outcome, and deletes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).with_name("stand_in.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/demo.yaml").write_text("run: {name: demo}\ntrain: {steps: 20}\n")
    return tmp_path


def demo(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from megamoe.commands.demo_run import run_demo; sys.exit(run_demo([sys.executable, sys.argv[1]]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EXACT_MATCH": "0.97", **variables}
    return subprocess.run(
        [sys.executable, "-c", code, str(STAND_IN)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_worker_is_killed_every_step_is_there_once_and_a_second_demo_keeps_the_first(folder: Path) -> None:
    first = demo(folder)
    assert first.returncode == 0, first.stderr
    assert "$ megamoe train configs/demo.yaml --nproc 4" in first.stdout
    assert "$ megamoe data synth data/demo --samples 80000 --seed 0 --level 1 --validation 500" in first.stdout
    assert "with SIGKILL" in first.stderr and "restart 1 of at most 3" in first.stderr
    assert "20 steps, each once; worker " in first.stderr
    assert "97.0% of the held-out captions (target 95%: reached)" in first.stderr
    assert len(list((folder / "runs/demo/logs").glob("attempt-*"))) == 2

    second = demo(folder, EXACT_MATCH="0.94")
    assert second.returncode == 1, "below the target is a failure"
    assert "MISSED" in second.stderr
    assert (folder / "data-verbs").read_text().count("synth") == 1, "complete shards are used again"
    assert (folder / "runs/demo-1/metrics.jsonl").exists() and (folder / "runs/demo/metrics.jsonl").exists()


def test_a_failing_command_ends_the_demo_and_half_made_shards_are_made_again(folder: Path) -> None:
    failed = demo(folder, FAIL="tokenizer")
    assert failed.returncode == 1
    assert "`megamoe data tokenizer data/demo/train data/demo/tokenizer --vocab-size 384` ended with" in failed.stderr
    assert "Traceback" not in failed.stderr and not (folder / "runs").exists()
    demo(folder, FAIL="index")
    verbs = (folder / "data-verbs").read_text()
    assert verbs.count("synth") == 2 and verbs.count("index") == 1


def test_elsewhere_than_in_the_repository_the_demo_says_where_to_go(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "megamoe", "demo"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 2
    assert "configs/demo.yaml" in answer.stderr and "root of the repository" in answer.stderr
