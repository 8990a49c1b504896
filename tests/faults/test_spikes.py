"""Loss spikes: seen before the update, computed again, skipped on all ranks alike, and passed over after a rollback.

What it must come to is told by other means: a NaN in the same steps, which DeepSpeed itself does not apply.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megamoe.checkpoint.folders import abandoned_of, newest_checkpoint
from megamoe.checkpoint.manifest import read_manifest
from tests.training import LOSSES, audit, metrics, small_config, with_fault, write_config

CASES = {
    "one": (1, ("optim.name=sgd", "optim.momentum=0.9", "optim.lr=0.1")),
    "pipeline-expert": (4, ("parallel.pipeline=2", "parallel.expert=2")),
    "zero2": (2, ("parallel.zero=2",)),
}
SPIKES = "9/1,10,13,14"  # a transient one, one alone, and two in a row, at which the run goes back
SKIPPED = (10, 12, 13, 14)  # of the last three the first one is the margin
COUNTS = ("tokens", "samples", "lost")


@pytest.fixture(scope="module")
def here(folder: Path) -> Path:
    train = {"steps": 16, "spike_window": 8, "max_spikes": 1, "spike_margin": 1, "max_skipped": 9}
    write_config(
        folder,
        small_config(train=train, optim={"name": "adamw", "lr": 3e-3, "clip": 0.5}, checkpoint={"every": 4, "keep": 9}),
    )
    return folder


def run(here: Path, script: str, fault: str, name: str, nproc: int, *overrides: str) -> list[tuple[int, str]]:
    return with_fault(
        here, script, fault, nproc, "config.yaml", "--resume", "auto", f"run.name={name}", *overrides, timeout=600
    )


def reference(here: Path, case: str) -> Path:
    """A run of that layout in which the steps ``SKIPPED`` have a NaN in both tries."""
    path = here / "runs" / f"{case}-reference"
    if not path.exists():
        nproc, overrides = CASES[case]
        tries = [step + place + again for place, step in enumerate(SKIPPED) for again in (0, 1)]
        faults = ",".join(map(str, tries))
        ended = run(here, "poisoned.py", faults, path.name, nproc, *overrides, "train.spike_threshold=0")
        assert {status for status, _ in ended} == {0}, ended[0][1][-900:]
        assert [row["step"] for row in metrics(path) if row["grad_norm"] is None] == list(SKIPPED)
    return path


def numbers(path: Path) -> list[list[Any]]:
    """What each step computed and came to; the norm is left out of the steps without an update."""
    keep = [key for key in (*LOSSES, *COUNTS, "lr", "load") if key != "grad_norm"]
    rows = metrics(path)
    assert [row["step"] for row in rows] == list(range(1, 17))
    return [[row[key] for key in keep] + ([] if row["step"] in SKIPPED else [row["grad_norm"]]) for row in rows]


def state(path: Path) -> tuple[Any, Any]:
    """Bits of weights and moments after the last step, and the position in the data."""
    folder = newest_checkpoint(path)
    assert folder is not None and folder.name == "step-00000016"
    tensors = {
        (file.name, name): tensor.numpy().tobytes()
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    return tensors, read_manifest(folder).state["position"]


def losses_of(path: Path) -> set[tuple[int, int, str]]:
    lines = [line for file in (path / "lost").glob("rank-*") for line in file.read_text().splitlines()]
    return {(row["step"], row["slot"], row["id"]) for row in map(json.loads, lines)}


@pytest.mark.parametrize("case", CASES)
def test_spikes_leave_what_steps_that_were_never_applied_leave(here: Path, case: str) -> None:
    nproc, overrides = CASES[case]
    path = here / "runs" / case
    ended = run(here, "spiky.py", SPIKES, case, nproc, *overrides)
    assert {status for status, _ in ended} == {0}, ended[0][1][-900:]
    said = "steps 13 to 14: 2 loss spikes in a row (train.max_spikes 1): goes back to step 8 and passes over steps 12 to 14"
    assert said in ended[0][1]

    other = reference(here, case)
    rows = metrics(path)
    spiky = [rows[step - 1].pop("loss") / row["loss"] for step, row in enumerate(metrics(other), 1) if step in (10, 13, 14)]
    assert min(spiky) > 2, "the steps that spiked are to be seen in the metrics"
    assert [row["recomputed"] for row in rows] == [0] * 8 + [1] + [2] * 7
    assert [row["spikes"] for row in rows] == [0] * 9 + [1, 1, 2, 3, 4, 4, 4]
    assert [row["rolled_back"] for row in rows] == [0] * 8 + [1] * 8
    same = [step for step in range(16) if step + 1 not in (10, 13, 14)]
    ours, theirs = numbers(path), numbers(other)
    assert [ours[step] for step in same] == [theirs[step] for step in same]
    assert state(path) == state(other)
    assert audit(path) == audit(other) and {step for step, _, _ in audit(path)} == set(range(1, 17)) - set(SKIPPED)
    assert losses_of(path) == losses_of(other) and {step for step, _, _ in losses_of(path)} == set(SKIPPED)


def test_a_start_after_the_rollback_goes_past_the_same_steps(here: Path) -> None:
    nproc, overrides = CASES["pipeline-expert"]
    killed = here / "runs/killed"
    ended = run(here, "spiky.py", f"{SPIKES},!12", "killed", nproc, *overrides)
    assert {status for status, _ in ended} == {-9}
    assert [row["step"] for row in metrics(killed)] == list(range(1, 12))
    assert [step for step, _ in abandoned_of(killed)] == [12], "made between what led to the spikes and them"
    shutil.copytree(killed, here / "runs/moved")

    # From here on only step 10 is a spike: that the others were is known from the checkpoint.
    ended = run(here, "spiky.py", "9/1,10", "killed", nproc, *overrides)
    assert {status for status, _ in ended} == {0}, ended[0][1][-900:]
    other = reference(here, "pipeline-expert")
    same = [step for step in range(16) if step != 9]
    assert [numbers(killed)[step] for step in same] == [numbers(other)[step] for step in same]
    assert state(killed) == state(other) and audit(killed) == audit(other) and losses_of(killed) == losses_of(other)

    ended = run(here, "spiky.py", "9/1,10", "moved", 2, "parallel.zero=2")
    assert {status for status, _ in ended} == {0}, ended[0][1][-900:]
    for row, its in zip(metrics(here / "runs/moved"), metrics(other), strict=True):
        assert row["step"] in (10,) or row["loss"] == pytest.approx(its["loss"], rel=1e-5), row["step"]
    assert audit(here / "runs/moved") == audit(other)


@pytest.mark.parametrize(
    ("fault", "override", "says"),
    [
        (
            "10,11",
            "checkpoint.every=20",
            "steps 10 to 11: 2 loss spikes in a row (train.max_spikes 1), and no checkpoint is",
        ),
        (
            "10,11,12,13",
            "train.max_rollbacks=1",
            "steps 12 to 13: 2 loss spikes in a row (train.max_spikes 1) after 1 roll",
        ),
    ],
)
def test_what_going_back_cannot_mend_stops_with_one_line(here: Path, fault: str, override: str, says: str) -> None:
    ((status, said),) = run(here, "spiky.py", fault, "stops" + fault.replace(",", "-"), 1, override)
    assert status == 2 and says in said and "Traceback" not in said, said[-900:]
    assert "raise train.spike_threshold" in said
