"""The state that a checkpoint says: its keys stay, old ones load, and what is malformed is refused."""

from __future__ import annotations

from typing import Any

import pytest

from megamoe.checkpoint.train_state import TrainState
from megamoe.core.errors import CheckpointError
from megamoe.metrics.counters import Counters

OLD: dict[str, Any] = {
    "step": 7, "tokens": 100, "samples": 20, "lost": 3, "recomputed": 2, "skipped": 1, "skipped_in_a_row": 0,
    "position": {"lanes": []}, "config": {"run": {}}, "tokenizer": "t", "data": "d",
}  # fmt: skip
ADDED = {"versions": {"torch": "2"}, "lost_shard": 1, "spikes": 2, "spike_watch": {"past": [3]}}


def test_the_keys_are_those_of_all_versions_before() -> None:
    state = TrainState.from_json(OLD | ADDED, "here")
    assert state.to_json() == OLD | ADDED
    assert state.counters == Counters(
        step=7, tokens=100, samples=20, lost=3, lost_shard=1, recomputed=2, skipped=1, skipped_in_a_row=0, spikes=2
    )
    assert (state.step, state.counters.updates) == (7, 4) and state.guard == {"past": [3]}


def test_a_state_of_the_first_versions_loads() -> None:
    state = TrainState.from_json(OLD, "here")
    assert state.counters.spikes == state.counters.lost_shard == 0 and state.guard == state.versions == {}


def test_samples_drawn_are_implied_by_the_position_and_not_saved() -> None:
    assert "drawn" not in Counters(drawn=5).to_json()


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ([], "not an object"),
        ({key: value for key, value in OLD.items() if key != "lost"}, "lost"),
        ({key: value for key, value in OLD.items() if key != "data"}, "data"),
        (OLD | {"step": -1}, "step"),
        (OLD | {"tokens": 1.5}, "tokens"),
        (OLD | {"of a later version": 1}, "of a later version"),
    ],
)
def test_a_malformed_state_is_refused(tree: object, named: str) -> None:
    with pytest.raises(CheckpointError, match=f"checkpoint here: its state is malformed .*{named}"):
        TrainState.from_json(tree, "here")
