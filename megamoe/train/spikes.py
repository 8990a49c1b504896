"""Detect loss spikes: judge a step by the median and the spread of the last updates.

A step is judged before its update by its loss and its gradient norm. The spread around the median is the median absolute
deviation, so neither past spikes nor a few odd batches move the threshold. All values are equal on all ranks, so all ranks
come to the same judgement.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

_TO_SIGMA = 1.4826  # median absolute deviation of a normal distribution -> its standard deviation
# A smooth run has next to no spread, and a threshold in units of that would fire at any change. So the spread is taken as
# at least this share of the median. Norms vary more than losses: by 3 times in the demo, losses by 1.7.
_LEAST_SPREAD = {"loss": 0.05, "gradient norm": 0.2}


class SpikeDetector:
    """Compare a step with a window of the last updates.

    Args:
        threshold: Spreads above the median from which on a value is a spike; 0 turns the detector off.
        window: Updates to compare with. Before there are that many, nothing is a spike.
    """

    def __init__(self, threshold: float, window: int):
        self._threshold = threshold
        self._recent = {what: deque[float](maxlen=window) for what in _LEAST_SPREAD}

    def reason(self, loss: float, grad_norm: float) -> str | None:
        """Say why a step is a spike; None if it is not one."""
        for what, value in (("loss", loss), ("gradient norm", grad_norm)):
            limit = self.limit(what)
            if value > limit:
                return f"{what} {value:.6g}, more than {limit:.6g} (train.spike_threshold)"
        return None

    def add(self, loss: float, grad_norm: float) -> None:
        """Add an applied step to the window."""
        self._recent["loss"].append(loss)
        self._recent["gradient norm"].append(grad_norm)

    def limit(self, what: str) -> float:
        """Return the largest ``loss`` or ``gradient norm`` that is no spike; infinity while nothing is judged."""
        recent = self._recent[what]
        if not self._threshold or len(recent) < (recent.maxlen or 0):
            return math.inf
        median = statistics.median(recent)
        spread = _TO_SIGMA * statistics.median(abs(value - median) for value in recent)
        return median + self._threshold * max(spread, _LEAST_SPREAD[what] * abs(median))

    @property
    def window(self) -> tuple[list[float], list[float]]:
        """Losses and gradient norms of the last updates, oldest first."""
        return list(self._recent["loss"]), list(self._recent["gradient norm"])

    def restore(self, losses: Sequence[float], norms: Sequence[float]) -> None:
        """Fill the window with what :attr:`window` returned."""
        self._recent["loss"].extend(losses)
        self._recent["gradient norm"].extend(norms)
