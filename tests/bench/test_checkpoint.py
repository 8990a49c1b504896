"""`megamoe bench checkpoint` measures what it says: every way saves and loads, and the ratios are of its own figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamoe.config import Config
from megamoe.model.size import model_size
from tests.training import megamoe, small_config, write_config


def test_figures_are_printed_and_written_and_the_ratios_are_theirs(tmp_path: Path) -> None:
    config = small_config(optim={"name": "adamw"}, parallel={"expert": 2})
    write_config(tmp_path, config)
    done = megamoe(
        "bench", "checkpoint", "config.yaml", "--nproc", "2", "--rounds", "1", "--json", "f.json", folder=tmp_path
    )
    result = json.loads((tmp_path / "f.json").read_text())
    assert result["failures"] == {} and result["bytes"] > 12 * model_size(Config.model_validate(config)).parameters
    for kind in ("save", "load"):
        seconds = result[f"{kind}_seconds"]
        assert sorted(seconds) == ["dcp", "deepspeed", "ours", "torch"] and min(seconds.values()) > 0
        assert result[f"ratio_torch_{kind}"] == pytest.approx(seconds["torch"] / seconds["ours"])
    assert result["stall_fraction_of_step"] == pytest.approx(result["stall_seconds"]["ours"] / result["step_seconds"])
    assert "stall_fraction_of_step" in done.stdout and "| torch.save |" in done.stdout
    assert not list((tmp_path / "data/bench/checkpoint").rglob("*.*")), "checkpoints are left"
