"""Which losses are taken for a spike, and what is remembered of them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from megamoe.config.training import TrainConfig
from megamoe.core.errors import CheckpointError
from megamoe.train.spikes import SpikeWatch


def fired(watch: SpikeWatch, losses: list[float], norms: list[float]) -> list[int]:
    """Places of the spikes; a spike is skipped."""
    spikes = []
    for place, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        if watch.what(loss, norm):
            spikes.append(place)
        else:
            watch.updated(loss, norm)
    return spikes


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 0.003, 0.1])
def test_nothing_fires_on_a_run_that_learns(seed: int, noise: float) -> None:
    """A loss that falls from 6 to 0.02 with noise in proportion, a plateau and a cliff; a norm with heavy tails."""
    rng = np.random.default_rng(seed)
    step = np.arange(3000)
    losses = (6 * np.exp(-step / 200) + 0.02 + 1.5 / (1 + np.exp((step - 900) / 5))) * np.exp(noise * rng.normal(size=3000))
    norms = (10 * np.exp(-step / 50) + 0.3) * np.exp(0.4 * rng.normal(size=3000))
    assert fired(SpikeWatch(TrainConfig()), losses.tolist(), norms.tolist()) == []


def test_a_jump_of_the_loss_or_of_the_norm_fires_and_does_not_move_the_threshold() -> None:
    rng = np.random.default_rng(0)
    losses, norms = 2.5 + 0.03 * rng.normal(size=300), 0.5 * np.exp(0.3 * rng.normal(size=300))
    losses[100:160] *= 2.5
    norms[200] = 30
    assert fired(SpikeWatch(TrainConfig()), losses.tolist(), norms.tolist()) == [*range(100, 160), 200]
    watch = SpikeWatch(TrainConfig(spike_threshold=0))
    assert fired(watch, losses.tolist(), norms.tolist()) == [], "0 turns it off"


def test_before_the_window_is_full_nothing_fires() -> None:
    watch = SpikeWatch(TrainConfig(spike_window=8))
    assert fired(watch, [1.0] * 7 + [100.0], [1.0] * 8) == []
    assert fired(watch, [100.0, 1.0, 100.0], [1.0] * 3) == [0, 2]


def test_what_a_checkpoint_keeps_judges_alike() -> None:
    rng = np.random.default_rng(1)
    config = TrainConfig(spike_window=16)
    watch = SpikeWatch(config)
    for loss in rng.random(40).tolist():
        watch.updated(loss, math.sqrt(loss))
    watch.in_a_row = [41, 42]
    before = SpikeWatch(config)
    before.past, before.rollbacks, before.rollbacks_in_a_row = {7, 8}, 4, 1
    watch.go_past(range(40, 43), before)
    other = SpikeWatch(config, json.loads(json.dumps(watch.to_json())))
    assert other.to_json() == watch.to_json()
    assert other.past == {7, 8, 40, 41, 42} and (other.rollbacks, other.rollbacks_in_a_row) == (5, 2)
    assert other._limit("loss") == watch._limit("loss")


def test_only_an_update_behind_the_steps_gone_past_ends_the_row_of_rollbacks() -> None:
    watch = SpikeWatch(TrainConfig())
    watch.go_past(range(5, 9), SpikeWatch(TrainConfig()))
    watch.saved(4)
    watch.saved(8)
    assert watch.rollbacks_in_a_row == 1
    watch.in_a_row = [9]
    watch.saved(9)
    assert watch.rollbacks_in_a_row == 1
    watch.updated(1.0, 1.0)
    watch.saved(10)
    assert (watch.rollbacks, watch.rollbacks_in_a_row) == (1, 0)


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
        SpikeWatch(TrainConfig(), SpikeWatch(TrainConfig()).to_json() | change)
    with pytest.raises(CheckpointError, match="record of loss spikes"):
        SpikeWatch(TrainConfig(), {"losses": []})
