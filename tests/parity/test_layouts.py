"""Promise 1: every layout computes what one process computes, step by step.

Real processes started by ``megamoe train``, real shards with captions of unequal length, packed; gloo on the CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megamoe.config import load_config
from tests.parity.reference import Reference, reference_run
from tests.training import audit, largest_difference, make_data, small_config, train, write_config

FP32 = 1e-5  # relative, for every loss part and the gradient norm, at each of ten steps

LAYOUTS = {
    "one process": (1, ()),
    "pipeline 2": (2, ("parallel.pipeline=2",)),
    "expert 2": (2, ("parallel.expert=2",)),
    "pipeline 2 x expert 2": (4, ("parallel.pipeline=2", "parallel.expert=2")),
    "expert 4": (4, ("parallel.expert=4",)),
    "pipeline 4": (4, ("parallel.pipeline=4",)),
    "pipeline 2 x data 2, micro-batch 2": (4, ("parallel.pipeline=2", "train.micro_batch=2")),
    "expert 2 x data 4, ZeRO-1": (4, ("parallel.expert=2",)),
    "expert 2, ZeRO-2": (2, ("parallel.expert=2", "parallel.zero=2", "train.micro_batch=2")),
    "expert 2, ZeRO-3": (2, ("parallel.expert=2", "parallel.zero=3")),
    "expert 2 x data 4, ZeRO-3": (4, ("parallel.expert=2", "parallel.zero=3", "data.workers=1")),
}
ADAMW = {
    "pipeline 2 x expert 2": LAYOUTS["pipeline 2 x expert 2"],
    "expert 2, ZeRO-2": LAYOUTS["expert 2, ZeRO-2"],
    "expert 2 x data 4, ZeRO-3": LAYOUTS["expert 2 x data 4, ZeRO-3"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and the runs of this module."""
    path = tmp_path_factory.mktemp("parity")
    make_data(path)
    write_config(path, small_config())
    write_config(
        path,
        small_config(optim={"name": "adamw", "lr": 3e-3, "clip": 0.5, "weight_decay": 0.1, "eps": 1e-5}),
        "adamw.yaml",
    )
    return path


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, Reference]:
    """The plain PyTorch runs."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return {name: reference_run(load_config(name)) for name in ("config.yaml", "adamw.yaml")}


def test_the_reference_learns_and_its_clipping_bites(references: dict[str, Reference]) -> None:
    for rows, clip in ((references["config.yaml"].rows, 0.05), (references["adamw.yaml"].rows, 0.5)):
        assert rows[-1]["lm_loss"] < rows[0]["lm_loss"] - 0.1
        assert all(row["grad_norm"] > 2 * clip for row in rows)
        assert all(row["aux_loss"] > 1 and row["z_loss"] > 0 for row in rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sgd_agrees_with_plain_pytorch(layout: str, folder: Path, references: dict[str, Reference]) -> None:
    nproc, overrides = LAYOUTS[layout]
    name = _name("sgd", layout)
    rows = train(folder, name, nproc, overrides)
    difference, where = largest_difference(references["config.yaml"].rows, rows)
    assert difference <= FP32, where
    assert audit(folder / "runs" / name) == references["config.yaml"].samples


@pytest.mark.parametrize("layout", ADAMW)
def test_adamw_agrees_with_plain_pytorch(layout: str, folder: Path, references: dict[str, Reference]) -> None:
    nproc, overrides = ADAMW[layout]
    rows = train(folder, _name("adamw", layout), nproc, overrides, config="adamw.yaml")
    difference, where = largest_difference(references["adamw.yaml"].rows, rows)
    assert difference <= FP32, where


@pytest.mark.parametrize("layout", ["pipeline 2 x expert 2", "expert 2, ZeRO-2", "expert 2, ZeRO-3"])
def test_bf16_agrees_to_its_precision(layout: str, folder: Path, references: dict[str, Reference]) -> None:
    nproc, overrides = LAYOUTS[layout]
    rows = train(folder, _name("bf16", layout), nproc, (*overrides, "train.precision=bf16"), config="adamw.yaml")
    for row, reference in zip(rows, references["adamw.yaml"].rows, strict=True):
        assert row["lm_loss"] == pytest.approx(reference["lm_loss"], rel=2e-2)
        assert row["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-1)
    assert rows[0]["lm_loss"] == pytest.approx(references["adamw.yaml"].rows[0]["lm_loss"], rel=3e-3)


@pytest.mark.parametrize("mode", ["block", "offload"])
@pytest.mark.parametrize("layout", ["pipeline 2 x expert 2", "expert 2, ZeRO-3"])
def test_recomputation_changes_nothing(mode: str, layout: str, folder: Path, references: dict[str, Reference]) -> None:
    nproc, overrides = LAYOUTS[layout]
    rows = train(folder, _name(mode, layout), nproc, (*overrides, f"parallel.recompute={mode}"))
    difference, where = largest_difference(references["config.yaml"].rows, rows)
    assert difference <= FP32, where
    assert all(sum(load) == pytest.approx(1) for row in rows for load in row["load"].values())


def _name(kind: str, layout: str) -> str:
    return f"{kind}-{layout}".replace(" ", "").replace(",", "-")
