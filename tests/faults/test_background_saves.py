"""Checkpoints written while training goes on: the same numbers, and nothing lost by what happens meanwhile.

A hook in the ranks makes chosen writes slow, so that steps certainly pass while a save is under way.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megamoe.checkpoint.verify import verify_checkpoint
from megamoe.core.exit_status import REQUEST_IS_WRONG, STOPPED
from tests.faults.launched import Launched, launched, saved
from tests.training import audit, metrics, small_config, train, with_fault, write_config

STEPS = 12
EXPERT_2 = ("parallel.expert=2",)
LAYOUTS = {
    "pipeline 2 x expert 2": (4, ("parallel.pipeline=2", "parallel.expert=2", "train.precision=bf16")),
    "ZeRO-3 x expert 2": (2, ("parallel.expert=2", "parallel.zero=3")),
}
EXACT = ("step", "loss", "lm_loss", "aux_loss", "z_loss", "grad_norm", "lr", "tokens", "samples", "load")
_HOOK = """
import os, re, time

def slow(kind, path):
    wanted = os.environ.get("SLOW", "").split(",")  # KIND:STEP:SECONDS
    step = re.search(r"\\.incomplete-step-0*(\\d+)", str(path))
    for each in filter(None, wanted):
        what, at, seconds = each.split(":")
        if step and what == kind and at in (step[1], "*"):
            time.sleep(float(seconds))

mkdir, fsync = os.mkdir, os.fsync

def slow_mkdir(path, *rest, **named):
    slow("before", path)
    mkdir(path, *rest, **named)

def slow_fsync(descriptor):
    slow("sync", os.readlink(f"/proc/self/fd/{descriptor}"))
    fsync(descriptor)

os.mkdir, os.fsync = slow_mkdir, slow_fsync
"""


@pytest.fixture(scope="module")
def folder(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, the hook, and a config that saves every fourth step in the background."""
    path = tmp_path_factory.mktemp("background") / "here"
    shutil.copytree(drawn, path)
    config = small_config(
        train={"steps": STEPS},
        optim={"name": "adamw", "lr": 3e-3, "clip": 0.5, "weight_decay": 0.1},
        checkpoint={"every": 4, "keep": 100, "async": True},
        launch={"max_restarts": 1},
    )
    write_config(path, config)
    (path / "hook").mkdir()
    (path / "hook/sitecustomize.py").write_text(_HOOK)
    return path


@pytest.fixture
def slow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Sets SLOW for the ranks of a test; the hook is found through the launcher's PYTHONPATH."""
    import tests.faults.launched as starts
    import tests.training as trainings

    for module in (starts, trainings):
        monkeypatch.setattr(module, "ROOT", f"{folder / 'hook'}:{trainings.ROOT}")
    return monkeypatch


def _whole(folder: Path, layout: str) -> Path:
    """The undisturbed run of a layout, which waits for each checkpoint."""
    nproc, settings = LAYOUTS[layout]
    name = "whole-" + layout.replace(" ", "")
    if not (folder / "runs" / name).exists():
        train(folder, name, nproc, (*settings, "checkpoint.async=false"))
    return folder / "runs" / name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_and_checkpoints_are_those_of_a_run_that_waits(layout: str, folder: Path, slow: pytest.MonkeyPatch) -> None:
    whole = _whole(folder, layout)
    slow.setenv("SLOW", "before:4:0.7")  # steps pass between the copy and the writing of it
    nproc, settings = LAYOUTS[layout]
    name = "background-" + layout.replace(" ", "")
    train(folder, name, nproc, settings)
    run = folder / "runs" / name
    assert _exact(run) == _exact(whole) and audit(run) == audit(whole)
    assert saved(run) == saved(whole) == [4, 8, 12]
    for step in saved(run):
        ours, theirs = (_tensors(each / f"checkpoints/step-{step:08d}") for each in (run, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), step
        assert verify_checkpoint(run / f"checkpoints/step-{step:08d}").problems == []


def test_killed_during_a_background_save_the_run_goes_on_from_the_one_before(
    folder: Path, slow: pytest.MonkeyPatch
) -> None:
    whole = _whole(folder, "ZeRO-3 x expert 2")
    slow.setenv("SLOW", "sync:8:3")
    with launched(folder, "killed", 2, *LAYOUTS["ZeRO-3 x expert 2"][1]) as run:
        run.until(lambda: _being_written(run, 8))
        run.until_step(9)
        os.kill(run.rank(1), signal.SIGKILL)
        status, said = run.end()
    assert status == 0, said
    assert ".incomplete-step-00000008: half-written, removed" in said
    assert "restart 1 of at most 1" in said
    assert _exact(run.run) == _exact(whole) and audit(run.run) == audit(whole)
    assert saved(run.run) == [4, 8, 12]


def test_a_write_that_fails_stops_all_ranks_alike_and_the_last_good_one_stays(folder: Path) -> None:
    ends = with_fault(folder, "full.py", "1,8", 2, "config.yaml", "run.name=full", *EXPERT_2, "train.steps=1000")
    run = folder / "runs/full"
    for status, said in ends:
        assert status == REQUEST_IS_WRONG and "Traceback" not in said, said
        assert ".incomplete-step-00000008/rank-00001.safetensors: cannot be written (" in said
    assert 8 < metrics(run)[-1]["step"] <= 12, "the training has not gone on, or not stopped at the next save"
    assert sorted(path.name for path in run.glob("checkpoints/step-*")) == ["step-00000004"]
    assert verify_checkpoint(run / "checkpoints/step-00000004").problems == []


def test_asked_to_stop_during_a_background_save_it_finishes_that_one_and_saves(
    folder: Path, slow: pytest.MonkeyPatch
) -> None:
    slow.setenv("SLOW", "sync:4:2")
    with launched(folder, "stopping", 2, *EXPERT_2, "train.steps=1000") as run:
        run.until(lambda: _being_written(run, 4))
        run.until_step(5)
        os.kill(run.rank(1), signal.SIGTERM)
        status, said = run.end()
    assert status == STOPPED, said
    last = metrics(run.run)[-1]["step"]
    assert saved(run.run)[0] == 4 and saved(run.run)[-1] == last > 4


def test_a_checkpoint_that_comes_too_soon_is_left_out_and_named_or_waits(folder: Path, slow: pytest.MonkeyPatch) -> None:
    settings = (*EXPERT_2, "checkpoint.every=1", "train.steps=4")
    slow.setenv("SLOW", "sync:1:2")
    with launched(folder, "skips", 2, *settings, "checkpoint.when_busy=skip") as run:
        status, said = run.end()
    assert status == 0, said
    assert "megamoe: step 2: no checkpoint, step-00000001 is still being written" in said
    assert 1 in saved(run.run) and 2 not in saved(run.run) and saved(run.run)[-1] == 4
    slow.setenv("SLOW", "sync:1:0.5")
    with launched(folder, "waits", 2, *settings) as run:
        status, said = run.end()
    assert status == 0, said
    assert "no checkpoint" not in said and saved(run.run) == [1, 2, 3, 4]


def _being_written(run: Launched, step: int) -> bool:
    return (run.run / f"checkpoints/.incomplete-step-{step:08d}").exists()


def _exact(run: Path) -> list[tuple[Any, ...]]:
    return [tuple(row[key] for key in EXACT) for row in metrics(run)]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return {key: tensor for key, tensor in found.items() if not key.startswith("rng/")}
