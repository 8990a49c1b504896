"""The learning rate is a function of the step alone."""

from __future__ import annotations

import pytest

from megamoe.config import OptimConfig
from megamoe.train.schedule import learning_rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {5: 0.5, 10: 1.0, 60: 1.0, 110: 1.0}),
        ("cosine", {5: 0.5, 10: 1.0, 60: 0.6, 110: 0.2}),
        ("wsd", {5: 0.5, 10: 1.0, 60: 1.0, 90: 1.0, 100: 0.6, 110: 0.2}),
    ],
)
def test_warm_up_then_the_schedule_down_to_the_final_rate(schedule: str, expected: dict[int, float]) -> None:
    config = OptimConfig.model_validate({"lr": 1.0, "warmup": 10, "decay": 20, "min_lr": 0.2, "schedule": schedule})
    for step, rate in expected.items():
        assert learning_rate(config, step, steps=110) == pytest.approx(rate)


def test_wsd_decays_over_a_tenth_of_the_run_by_default() -> None:
    config = OptimConfig.model_validate({"lr": 1.0, "warmup": 0, "min_lr": 0.0, "schedule": "wsd"})
    assert [learning_rate(config, step, steps=100) for step in (1, 90, 95, 100)] == pytest.approx([1.0, 1.0, 0.5, 0.0])
