"""A snapshot of the live state, brought to disk and back, restores all of it."""

from __future__ import annotations

import json
from dataclasses import replace

from megamoe.checkpoint.train_state import TrainState
from megamoe.config import Config
from megamoe.metrics.counters import Counters
from megamoe.train.guard import Guard
from megamoe.train.live_state import LiveState

FINGERPRINTS = {"tokenizer": "t", "data": "d"}


def test_a_snapshot_restores_counters_and_guard_and_stays_as_it_was_taken() -> None:
    config = Config()
    state = LiveState(config, FINGERPRINTS, None)
    state.counters = Counters(step=5, tokens=50, samples=10, lost=2, lost_shard=1, drawn=11, skipped=1, spikes=1)
    state.guard.pass_over([4], Guard(config.train))
    snapshot = state.snapshot()
    state.counters = state.counters.plus(step=1)
    state.guard.pass_over([7], state.guard)

    position = {"cursors": [6, 5], "anchors": [[0, 0]], "quarantine": {"00001.tar": 3}}
    saved = TrainState.from_json(json.loads(json.dumps(snapshot.to_json())) | {"position": position}, "here")
    other = LiveState(config, FINGERPRINTS, None)
    other.restore(saved)
    assert other.counters == Counters(step=5, tokens=50, samples=10, lost=2, lost_shard=1, drawn=11, skipped=1, spikes=1)
    assert other.guard.passed_over == {4} and other.guard.rollbacks == 1
    assert other.snapshot() == replace(snapshot, position={}) and saved.tokenizer == "t" and "torch" in saved.versions
