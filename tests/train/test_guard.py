"""The guard: the table of its judgement, what it does with a step, and what a checkpoint keeps of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest

from megamoe.config.training import TrainConfig
from megamoe.core.errors import CheckpointError, NonFiniteError
from megamoe.metrics.counters import Counters
from megamoe.train.guard import Action, Fault, Guard, Outcome, judge

LIMITS = TrainConfig(max_skipped=2, max_spikes=1, spike_window=8)


@pytest.mark.parametrize(
    ("fault", "tries", "skipped", "spikes", "action"),
    [
        (None, 1, 0, 0, Action.APPLY),
        (None, 2, 2, 1, Action.APPLY),
        (Fault.NOT_FINITE, 1, 0, 0, Action.RETRY),
        (Fault.NOT_FINITE, 1, 2, 0, Action.RETRY),
        (Fault.NOT_FINITE, 2, 0, 0, Action.SKIP),
        (Fault.NOT_FINITE, 2, 1, 1, Action.SKIP),
        (Fault.NOT_FINITE, 2, 2, 0, Action.STOP),
        (Fault.SPIKE, 1, 0, 1, Action.RETRY),
        (Fault.SPIKE, 2, 0, 0, Action.SKIP),
        (Fault.SPIKE, 2, 2, 0, Action.SKIP),
        (Fault.SPIKE, 2, 0, 1, Action.GO_BACK),
        (Fault.PASSED_OVER, 1, 0, 0, Action.SKIP),
        (Fault.PASSED_OVER, 1, 2, 1, Action.SKIP),
    ],
)
def test_the_table_of_judgements(fault: Fault | None, tries: int, skipped: int, spikes: int, action: Action) -> None:
    assert judge(fault, tries, skipped, spikes, LIMITS) is action


@dataclass(frozen=True)
class Result:
    """As much of the engine's result as the guard looks at."""

    loss: float
    grad_norm: float = 1.0
    applied: bool = False

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def compute(guard: Guard, counters: Counters, *losses: float) -> tuple[Outcome, Counters]:
    """One step of 10 tokens and 2 samples whose tries have these losses, as the engine computes it."""
    left = list(losses)

    def attempt(accepts: Callable[[Result], bool]) -> Result:
        result = Result(left.pop(0))
        return replace(result, applied=result.finite and accepts(result))

    outcome = guard.compute(counters, attempt)
    assert not left, "computed as often as it should be"
    return outcome, outcome.count(counters, 10, 2)


def warmed_up(limits: TrainConfig = LIMITS) -> tuple[Guard, Counters]:
    guard, counters = Guard(limits), Counters()
    for _ in range(limits.spike_window):
        _, counters = compute(guard, counters, 1.0)
    return guard, counters


def test_a_fault_that_passes_is_counted_and_nothing_else() -> None:
    for bad in (math.nan, 50.0):
        guard, before = warmed_up()
        outcome, after = compute(guard, before, bad, 1.0)
        assert outcome.applied and outcome.tries == 2 and outcome.reason == ""
        assert after == before.plus(step=1, tokens=10, samples=2, recomputed=1)
        assert guard.spikes_in_a_row == []


def test_steps_that_are_not_finite_are_skipped_and_too_many_in_a_row_end_the_run() -> None:
    guard, start = warmed_up()
    counters = start
    for _ in range(2):
        outcome, counters = compute(guard, counters, math.nan, math.inf)
        assert (outcome.action, outcome.fault) == (Action.SKIP, Fault.NOT_FINITE)
    assert counters == start.plus(step=2, recomputed=2, skipped=2, skipped_in_a_row=2)
    with pytest.raises(NonFiniteError, match=r"step 11: loss nan, gradient norm 1.0, twice, and no update for 2 steps"):
        compute(guard, counters, math.inf, math.nan)
    _, counters = compute(guard, counters, 1.0)
    assert (counters.skipped, counters.skipped_in_a_row) == (2, 0)


def test_spikes_are_skipped_until_the_run_goes_back_and_passes_over_them() -> None:
    guard, counters = warmed_up()
    outcome, counters = compute(guard, counters, 50.0, 50.0)
    assert outcome.action is Action.SKIP and "loss 50, more than 2 (train.spike_threshold)" in outcome.reason
    outcome, counters = compute(guard, counters, math.nan, math.nan)
    assert outcome.action is Action.SKIP and guard.spikes_in_a_row == [9], "what is not finite neither adds nor ends a row"
    outcome, counters = compute(guard, counters, 50.0, 50.0)
    assert outcome.action is Action.GO_BACK and guard.spikes_in_a_row == [9, 11]
    assert (counters.spikes, counters.updates) == (2, 8)

    again, counters = warmed_up()
    again.pass_over(range(9, 12), guard)
    for _ in range(3):
        outcome, counters = compute(again, counters, 1.0)
        assert (outcome.action, outcome.fault, outcome.tries) == (Action.SKIP, Fault.PASSED_OVER, 1)
    outcome, counters = compute(again, counters, 1.0)
    assert outcome.applied and (counters.spikes, counters.updates) == (3, 9)


def test_what_a_checkpoint_keeps_judges_alike() -> None:
    rng = np.random.default_rng(1)
    config = TrainConfig(spike_window=16)
    guard, counters = Guard(config), Counters()
    for loss in rng.random(40).tolist():
        _, counters = compute(guard, counters, loss)
    guard.spikes_in_a_row = [41, 42]
    before = Guard(config)
    before.passed_over, before.rollbacks, before.rollbacks_in_a_row = {7, 8}, 4, 1
    guard.pass_over(range(40, 43), before)
    other = Guard(config, json.loads(json.dumps(guard.to_json())))
    assert other.to_json() == guard.to_json()
    assert other.passed_over == {7, 8, 40, 41, 42} and (other.rollbacks, other.rollbacks_in_a_row) == (5, 2)
    assert other._detector.limit("loss") == guard._detector.limit("loss") < math.inf


def test_the_keys_of_a_checkpoint_are_those_of_all_versions_before() -> None:
    guard, counters = warmed_up()
    compute(guard, counters, 50.0, 50.0)
    assert guard.to_json() == {
        "losses": [1.0] * 8,
        "norms": [1.0] * 8,
        "in_a_row": [9],
        "past": [],
        "rollbacks": [0, 0],
    }


def test_only_an_update_behind_the_steps_passed_over_ends_the_row_of_rollbacks() -> None:
    guard = Guard(TrainConfig())
    guard.pass_over(range(5, 9), Guard(TrainConfig()))
    guard.saved(4)
    guard.saved(8)
    assert guard.rollbacks_in_a_row == 1
    guard.spikes_in_a_row = [9]
    guard.saved(9)
    assert guard.rollbacks_in_a_row == 1
    compute(guard, Counters(step=9), 1.0)
    guard.saved(10)
    assert (guard.rollbacks, guard.rollbacks_in_a_row) == (1, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"losses": ["1"]},
        {"norms": [float("inf")]},
        {"in_a_row": 3},
        {"past": [-1]},
        {"rollbacks": [1]},
        {"rollbacks": None},
    ],
)
def test_a_record_that_is_not_ours_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="record of loss spikes"):
        Guard(TrainConfig(), Guard(TrainConfig()).to_json() | change)
    with pytest.raises(CheckpointError, match="record of loss spikes"):
        Guard(TrainConfig(), {"losses": []})
