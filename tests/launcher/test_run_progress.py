"""How far a run has come, as its folder says."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.workers.run_progress import RunState, run_state


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("", 0),
        ('{"step":7}\n', 7),
        ('{"step": 7, "loss": 1.0}\n{"loss": 2.0, "step": 8}\n', 8),
        ('{"loss": {"step": 99}, "step": 8}\n', 8),
        ('{"step": 7}\n{"step": 8, "lo', 7),
        ('{"step": 7}\n{"step": 8', 7),
        ('{"step": 7}\n{"loss": 1.0}\n[8]\n', 7),
        ("nothing of ours\n", 0),
    ],
)
def test_the_last_whole_record_says_the_step_wherever_its_key_stands(text: str, step: int, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    assert run_state(tmp_path, launched=0).reached == step


def test_only_the_end_of_long_metrics_is_read(tmp_path: Path) -> None:
    filler = "x" * 1000
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.writelines(f'{{"load": "{filler}", "step": {number}}}\n' for number in range(1, 3001))
    assert run_state(tmp_path, launched=0).reached == 3000


def test_a_checkpoint_is_a_folder_named_by_its_step(tmp_path: Path) -> None:
    for name in ("step-00000002", "step-00000010", "step-00000011.old", "step-none", ".incomplete-step-00000012"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert run_state(tmp_path, launched=0) == RunState(0, 10, tmp_path / "checkpoints/step-00000010")
    newest = (tmp_path / "checkpoints/step-00000010").stat().st_mtime
    assert run_state(tmp_path, launched=newest + 5) == RunState(0, 0, None)
