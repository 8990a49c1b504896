"""Damage to checkpoints and kills inside of saves: real runs, real files cut, flipped and removed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megamoe.checkpoint.verify import verify_checkpoint
from tests.training import ROOT, audit, make_data, megamoe, metrics, small_config, train, write_config

STEPS = 6
EXPERT_2 = ("parallel.expert=2",)
EXACT = ("step", "loss", "grad_norm", "lr", "tokens", "samples", "load")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a run of six steps on two ranks: the last two checkpoints stay, and those of each second step."""
    path = tmp_path_factory.mktemp("checkpoints")
    make_data(path, samples=140)
    config = small_config(
        train={"steps": STEPS},
        optim={"name": "adamw", "lr": 3e-3, "clip": 0.5, "weight_decay": 0.1},
        checkpoint={"every": 1, "keep": 2, "keep_every": 2},
    )
    write_config(path, config)
    train(path, "base", 2, EXPERT_2)
    return path


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(base, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def test_the_last_checkpoints_stay_and_every_second(base: Path) -> None:
    assert _steps(base / "runs/base") == [2, 4, 5, 6]


def test_auto_takes_the_newest_good_checkpoint_and_names_the_damaged_ones(folder: Path) -> None:
    run = folder / "runs/base"
    before = metrics(run), audit(run)
    _flip(run / "checkpoints/step-00000006/rank-00001.safetensors")  # only rank 1 finds it, when it reads
    cut = run / "checkpoints/step-00000005/rank-00000.safetensors"
    os.truncate(cut, cut.stat().st_size - 100)
    (run / "checkpoints/.incomplete-step-00000007").mkdir()
    done = _auto(folder)
    lines = [line for line in done.stderr.splitlines() if line.startswith("megamoe: ")]
    assert "step-00000006/rank-00001.safetensors" in lines[0] and "checksum" in lines[0]
    assert "step-00000005/rank-00000.safetensors" in lines[1] and "bytes, not" in lines[1]
    assert any(".incomplete-step-00000007" in line and "half-written" in line for line in lines)
    assert all("taking the one before" in line for line in lines[:2])
    assert _exact(metrics(run)) == _exact(before[0]) and audit(run) == before[1]
    assert _steps(run) == [2, 4, 5, 6], "the damaged ones were not replaced"
    assert not [p for s in _steps(run) for p in verify_checkpoint(run / f"checkpoints/step-{s:08d}").problems]


def test_a_run_without_a_good_checkpoint_stops_with_one_line_and_keeps_its_records(folder: Path) -> None:
    run = folder / "runs/base"
    manifest = run / "checkpoints/step-00000006/manifest.json"
    os.truncate(manifest, manifest.stat().st_size // 2)
    (run / "checkpoints/step-00000005/rank-00001.safetensors").unlink()
    _flip(run / "checkpoints/step-00000004/manifest.json")
    (run / "checkpoints/step-00000002/manifest.json").write_text("[]")
    done = _auto(folder, status=2)
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "none of its 4 checkpoints is good" in line
    for step, why in ((6, "not valid JSON"), (5, "file is missing"), (4, "damaged"), (2, "names no format")):
        assert any(f"step-{step:08d}" in text and why in text for text in done.stderr.splitlines()), (step, done.stderr)
    assert len(metrics(run)) == STEPS


def test_after_resume_from_an_earlier_step_auto_follows_the_new_history(folder: Path) -> None:
    run = folder / "runs/base"
    _train(folder, "--resume", str(run / "checkpoints/step-00000002"), "train.steps=3")
    assert _steps(run) == [2, 3] and [row["step"] for row in metrics(run)] == [1, 2, 3]
    names = sorted(path.name for path in (run / "checkpoints").glob(".*"))
    assert names == [f".abandoned-step-{step:08d}" for step in (4, 5, 6)]
    done = _auto(folder, "train.steps=4")
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4], done.stderr
    assert not verify_checkpoint(run / "checkpoints/.abandoned-step-00000006").problems


def test_a_checkpoint_of_another_run_becomes_the_runs_own(folder: Path) -> None:
    """Its own checkpoints, older ones too, are of another history: nobody goes on from them."""
    shutil.copytree(folder / "runs/base", folder / "runs/other")
    run = folder / "runs/base"
    shutil.rmtree(run / "checkpoints/step-00000004")
    _train(folder, "--resume", str(folder / "runs/other/checkpoints/step-00000004"), "train.steps=4")
    assert _steps(run) == [4]
    assert verify_checkpoint(run / "checkpoints/step-00000004").problems == []
    assert sorted(p.name[-1] for p in (run / "checkpoints").glob(".abandoned-*")) == ["2", "5", "6"]


def test_what_killed_ranks_left_half_written_goes_with_the_next_start(folder: Path) -> None:
    run = folder / "runs/base"
    left = [run / ".config.yaml.77.tmp", run / "index/.00000.tar.idx.77.tmp"]
    for path in left:
        path.write_bytes(b"half")
    # As a kill leaves it between the publication of a checkpoint and the deletion of the one that goes for it.
    left.append(run / "checkpoints/step-00000001")
    shutil.copytree(run / "checkpoints/step-00000002", left[-1])
    before = sorted((run / "index").iterdir())
    _auto(folder)
    assert not any(path.exists() for path in left)
    assert sorted((run / "index").iterdir()) == [path for path in before if path not in left]


def test_killed_inside_saves_and_deletions_a_run_ends_as_if_undisturbed(folder: Path) -> None:
    """SIGKILL by the process itself at three places: a half-written file, just before publication, inside a deletion."""
    (folder / "hook").mkdir()
    (folder / "hook/sitecustomize.py").write_text(_KILLS)
    command = ["train", "config.yaml", "--nproc", "2", "--resume", "auto", "run.name=killed", "launch.max_restarts=3"]
    variables = {"PYTHONPATH": f"{folder / 'hook'}:{ROOT}", "KILLED": str(folder / "hook"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*_PYTHON, *command, *EXPERT_2], cwd=folder, env=os.environ | variables, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    killed = sorted(path.name for path in (folder / "hook").glob("*.done"))
    assert killed == ["delete.done", "publish.done", "write.done"], done.stderr
    run = folder / "runs/killed"
    assert "half-written" in done.stderr and len(list(run.glob("logs/*/pids.json"))) == 4
    assert _exact(metrics(run)) == _exact(metrics(folder / "runs/base")) and audit(run) == audit(folder / "runs/base")
    assert _steps(run) == [2, 4, 5, 6] and not list((run / "checkpoints").glob(".*"))
    answer = megamoe("checkpoint", "verify", "runs/killed", "--json", folder=folder)
    assert [verdict["problems"] for verdict in json.loads(answer.stdout)] == [[], [], [], []]


_PYTHON = [sys.executable, "-m", "megamoe"]
_KILLS = """
import os, signal, pathlib

def once(name):
    mark = pathlib.Path(os.environ["KILLED"], name + ".done")
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

sync, rename = os.fsync, os.rename

def fsync(descriptor):
    if os.environ.get("RANK") == "1" and ".incomplete-step-00000002" in os.readlink(f"/proc/self/fd/{descriptor}"):
        once("write")
    sync(descriptor)

def renamed(source, target):
    if str(target).endswith("/step-00000003"):
        once("publish")
    rename(source, target)
    if "/.deleted-step-00000003" in str(target):
        once("delete")

os.fsync, os.rename = fsync, renamed
"""


def _exact(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(row[key] for key in EXACT) for row in rows]


def _steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def _flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _train(folder: Path, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = megamoe(
        "train", "config.yaml", "--nproc", "2", "run.name=base", *EXPERT_2, *arguments, folder=folder, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def _auto(folder: Path, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    return _train(folder, "--resume", "auto", *arguments, status=status)
