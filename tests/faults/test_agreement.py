"""A bit that flips in the weights of one rank is found, the rank is named, and no checkpoint is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training import make_data, small_config, with_fault, write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agreement")
    make_data(folder)
    write_config(folder, small_config(train={"steps": 8, "check_every": 4}, checkpoint={"every": 3}))
    return folder


@pytest.mark.parametrize(
    ("fault", "overrides", "named"),
    [
        ("3,3,dense", [], "dense parameters of rank 3 (of ranks 0, 1, 2, 3)"),
        ("1,3,expert", ["parallel.expert=2"], "experts of rank 1, 3 (of ranks 1, 3)"),
        ("2,3,dense", ["parallel.pipeline=2", "parallel.expert=2"], "dense parameters of rank 2, 3 (of ranks 2, 3)"),
    ],
)
def test_a_flipped_bit_is_found_before_it_is_saved(folder: Path, fault: str, overrides: list[str], named: str) -> None:
    name = fault.replace(",", "-")
    ended = with_fault(folder, "flipped.py", fault, 4, "config.yaml", f"run.name={name}", *overrides)
    assert all(status not in (0, 2) for status, _ in ended)
    assert any(f"ranks disagree that must be equal: {named}" in said for _, said in ended), ended[0][1][-600:]
    assert not list((folder / "runs" / name / "checkpoints").glob("step-*"))
