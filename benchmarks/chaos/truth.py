"""What an undisturbed run gives, once per layout, and how a trial is held against it."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.plan import EVERY, KEEP, LAYOUTS, SKIPPED, STEPS, Plan
from benchmarks.chaos.training import Missed, Training
from tests.training import LOSSES, audit, make_data, metrics, small_config, write_config

EXACT = ("step", *LOSSES, "lr", "tokens", "samples", "lost", "load")
LIMIT = 1e-5  # relative, in fp32


@dataclass(frozen=True)
class Truth:
    """Of an undisturbed run: its folder, what it took in seconds, the bytes of one checkpoint."""

    run: Path
    seconds: float
    checkpoint: int


def prepare(folder: Path) -> None:
    """Data and the config; what is there already is not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    config = small_config(
        train={"steps": STEPS},
        # eps: as in the matrix of layouts. Where a gradient is all but zero, Adam would make rounding errors large.
        optim={"name": "adamw", "lr": 3e-3, "clip": 0.5, "weight_decay": 0.1, "eps": 1e-5},
        checkpoint={"every": EVERY, "keep": KEEP},
        # Trials have up to three faults; none of them may be taken for the last straw.
        launch={"max_restarts": 8, "max_restarts_without_progress": 8},
    )
    write_config(folder, config)
    if not (folder / "tokenizer.model").exists():  # it is made last
        shutil.rmtree(folder / "shards", ignore_errors=True)
        make_data(folder)


def truth_of(folder: Path, layout: str, lasting: bool) -> Truth:
    """The undisturbed run of a layout, ``lasting``: but for a step that is skipped; made if it is not there.

    Raises:
        Missed: it failed.
    """
    name = f"truth-{layout.replace(' ', '-')}{'-skipped' if lasting else ''}"
    run, note = folder / "runs" / name, folder / "said" / f"{name}.json"
    if not note.exists():
        shutil.rmtree(run, ignore_errors=True)
        variables = {"CHAOS_TRIAL": f"{name}-{time.time_ns()}"}
        if lasting:
            variables["CHAOS_NAN"] = f"{SKIPPED},0,lasting,{folder / 'said' / f'{name}.mark'}"
        training = Training(folder, run, (), variables)
        started = time.monotonic()
        try:
            training.launch(layout)
            if training.end() != 0:
                raise Missed(f"the undisturbed run of {layout} failed:\n{training.said.read_text()}")
            seconds = time.monotonic() - started
            size = sum(path.stat().st_size for path in training.checkpoints()[-1].iterdir())
        finally:
            training.close()
        shutil.rmtree(run / "checkpoints")
        note.write_text(json.dumps({"seconds": seconds, "checkpoint": size}))
    return Truth(run, **json.loads(note.read_text()))


def differences(plan: Plan, run: Path, truth: Path) -> list[str]:
    """What of a finished run is not as in the undisturbed one of the layout it began with; nothing if all is."""
    rows, good = metrics(run), metrics(truth)
    steps = [row["step"] for row in rows]
    if steps != list(range(1, STEPS + 1)):
        return [f"metrics.jsonl has the steps {steps}"]
    wrong = []
    ranks = LAYOUTS[plan.layout][0]
    for row, other in zip(rows, good, strict=True):
        exact = row["world_size"] == ranks  # a smaller layout has fewer ranks, and nothing goes back to more
        for key in EXACT if exact else LOSSES:
            if row[key] != other[key] and (exact or not _near(row[key], other[key])):
                wrong.append(f"step {row['step']}, {key}: {row[key]}, undisturbed {other[key]}")
    if audit(run) != audit(truth):
        wrong.append("the audit has other samples than that of the undisturbed run")
    if _lost(run) != _lost(truth):
        wrong.append(f"the lost samples are {_lost(run)}, undisturbed {_lost(truth)}")
    return wrong[:10]


def _near(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) <= LIMIT * abs(other)


def _lost(run: Path) -> list[tuple[Any, ...]]:
    rows = []
    for path in sorted((run / "lost").glob("rank-*.jsonl")):
        rows += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted((row["step"], row["slot"], row["id"]) for row in rows)
