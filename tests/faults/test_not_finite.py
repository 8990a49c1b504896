"""A gradient that is not finite: computed again, and skipped on all ranks alike if it is so again (injected NaN)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training import audit, largest_difference, make_data, metrics, small_config, train, with_fault, write_config

LAYOUTS = {
    "expert 2": ["parallel.expert=2"],
    "ZeRO-3": ["parallel.zero=3"],
    "pipeline 2, bf16": ["parallel.pipeline=2", "train.precision=bf16"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("not-finite")
    make_data(folder)
    config = small_config(train={"steps": 6}, optim={"name": "adamw", "lr": 1e-2, "clip": 1.0})
    write_config(folder, config)
    return folder


def poisoned(folder: Path, name: str, computations: str, overrides: list[str]) -> Path:
    """A run of two ranks with a NaN in some computations."""
    ended = with_fault(folder, "poisoned.py", computations, 2, "config.yaml", f"run.name={name}", *overrides)
    assert [status for status, _ in ended] == [0, 0], ended
    return folder / "runs" / name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_transient_fault_leaves_no_trace_and_a_lasting_one_skips_the_step_everywhere(folder: Path, layout: str) -> None:
    overrides = LAYOUTS[layout]
    name = layout.replace(" ", "").replace(",", "-")
    undisturbed = train(folder, f"{name}-good", 2, overrides)
    once = poisoned(folder, f"{name}-once", "3", overrides)
    assert largest_difference(undisturbed, metrics(once)) == (0.0, "equal")
    assert [row["recomputed"] for row in metrics(once)] == [0, 0, 1, 1, 1, 1]
    assert audit(once) == audit(folder / f"runs/{name}-good")

    twice = poisoned(folder, f"{name}-twice", "3,4", overrides)
    rows = metrics(twice)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1] and [row["step"] for row in rows] == list(range(1, 7))
    assert largest_difference(undisturbed[:2], rows[:2]) == (0.0, "equal")
    assert rows[2]["samples"] == rows[1]["samples"] and rows[2]["tokens"] == rows[1]["tokens"], "nothing was trained on"
    assert rows[2]["grad_norm"] is None and all(row["grad_norm"] > 0 for row in rows[3:])
    assert rows[3]["loss"] != undisturbed[3]["loss"], "the update was not made"
    skipped = [row for row in audit(folder / f"runs/{name}-good") if row[0] == 3]
    assert audit(twice) == [row for row in audit(folder / f"runs/{name}-good") if row[0] != 3]
    lost = [json.loads(line) for path in (twice / "lost").glob("rank-*") for line in path.read_text().splitlines()]
    assert sorted((row["step"], row["slot"], row["id"]) for row in lost) == sorted(skipped)
    assert all(row["reason"].startswith("step skipped: loss ") for row in lost)
