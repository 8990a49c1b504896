"""Which losses and gradient norms are taken for a spike."""

from __future__ import annotations

import numpy as np
import pytest

from megamoe.config.training import TrainConfig
from megamoe.train.spikes import SpikeDetector


def detector(**settings: float) -> SpikeDetector:
    config = TrainConfig.model_validate(settings)
    return SpikeDetector(config.spike_threshold, config.spike_window)


def fired(spikes: SpikeDetector, losses: list[float], norms: list[float]) -> list[int]:
    """Places of the spikes; a spike is skipped."""
    places = []
    for place, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        if spikes.reason(loss, norm):
            places.append(place)
        else:
            spikes.add(loss, norm)
    return places


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 0.003, 0.1])
def test_nothing_fires_on_a_run_that_learns(seed: int, noise: float) -> None:
    """A loss that falls from 6 to 0.02 with noise in proportion, a plateau and a cliff; a norm with heavy tails."""
    rng = np.random.default_rng(seed)
    step = np.arange(3000)
    losses = (6 * np.exp(-step / 200) + 0.02 + 1.5 / (1 + np.exp((step - 900) / 5))) * np.exp(noise * rng.normal(size=3000))
    norms = (10 * np.exp(-step / 50) + 0.3) * np.exp(0.4 * rng.normal(size=3000))
    assert fired(detector(), losses.tolist(), norms.tolist()) == []


def test_a_jump_of_the_loss_or_of_the_norm_fires_and_does_not_move_the_threshold() -> None:
    rng = np.random.default_rng(0)
    losses, norms = 2.5 + 0.03 * rng.normal(size=300), 0.5 * np.exp(0.3 * rng.normal(size=300))
    losses[100:160] *= 2.5
    norms[200] = 30
    assert fired(detector(), losses.tolist(), norms.tolist()) == [*range(100, 160), 200]
    off = detector(spike_threshold=0)
    assert fired(off, losses.tolist(), norms.tolist()) == [], "0 turns it off"


def test_before_the_window_is_full_nothing_fires() -> None:
    short = detector(spike_window=8)
    assert fired(short, [1.0] * 7 + [100.0], [1.0] * 8) == []
    assert fired(short, [100.0, 1.0, 100.0], [1.0] * 3) == [0, 2]
