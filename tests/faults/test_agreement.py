"""A bit that flips in the weights of one rank is found, the rank is named, and no checkpoint is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training import make_data, small_config, with_fault, write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agreement")
    make_data(folder)
    train = {"steps": 8, "check_every": 4}
    write_config(folder, small_config(train=train, optim={"name": "adamw", "lr": 3e-3}, checkpoint={"every": 3}))
    return folder


@pytest.mark.parametrize(
    ("fault", "overrides", "named"),
    [
        ("3,3,dense", [], "ranks disagree that must be equal: dense parameters of rank 3 (of ranks 0, 1, 2, 3)"),
        ("1,3,expert", ["parallel.expert=2"], "must be equal: experts of rank 1, 3 (of ranks 1, 3)"),
        ("2,3,dense", ["parallel.pipeline=2", "parallel.expert=2"], "dense parameters of rank 2, 3 (of ranks 2, 3)"),
        (
            "1,3,main",
            ["parallel.pipeline=2"],
            "step 3: main parameters or moments of rank 1 changed between two updates",
        ),
        ("1,3,moment", ["parallel.zero=3"], "step 3: main parameters or moments of rank 1 changed between two updates"),
        ("1,3,generator", [], "step 3: ranks disagree that must be equal: random generators of rank 0, 1 (of ranks 0, 1)"),
        ("0,3,position", ["parallel.pipeline=2"], "step 3: data position: the lanes stand at "),
    ],
)
def test_a_flipped_bit_is_found_before_it_is_saved(folder: Path, fault: str, overrides: list[str], named: str) -> None:
    name = fault.replace(",", "-")
    nproc = 4 if fault.endswith(("dense", "expert")) else 2
    ended = with_fault(folder, "flipped.py", fault, nproc, "config.yaml", f"run.name={name}", *overrides, timeout=600)
    assert all(status not in (0, 2) for status, _ in ended)
    assert any(named in said for _, said in ended), ended[0][1][-600:]
    assert not list((folder / "runs" / name / "checkpoints").glob("step-*"))
