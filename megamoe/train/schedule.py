"""Compute the learning rate from the step alone, so that a resumed run needs no state for it."""

from __future__ import annotations

import math

from megamoe.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of optimizer step ``step`` (from 1) of ``steps``.

    Linear warm-up over ``warmup`` steps, then one of: cosine to ``min_lr`` at the last step (arXiv:1608.03983);
    wsd, constant and then linear to ``min_lr`` over the last ``decay`` steps (arXiv:2404.06395); constant.
    """
    if step <= config.warmup:
        return config.lr * step / config.warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        done = (step - config.warmup) / max(1, steps - config.warmup)
        fall = 0.5 * (1 - math.cos(math.pi * done))
    else:
        decay = config.decay or max(1, steps // 10)
        fall = max(0.0, (step - (steps - decay)) / decay)
    return config.lr * (1 - (1 - config.min_lr) * fall)
