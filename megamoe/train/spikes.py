"""Loss spikes: which step is one, how many came in a row, and which steps are gone past after a rollback.

A step is judged before its update by its loss and its gradient norm, both against the median of the last updates. The
spread around it is measured by the median absolute deviation, so that neither past spikes nor a few odd batches move the
threshold. All of this is computed from values that are equal on all ranks, so all come to the same end.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any

from megamoe.config.training import TrainConfig
from megamoe.core.errors import CheckpointError

_TO_SIGMA = 1.4826  # median absolute deviation of a normal distribution -> its standard deviation
# Where a run goes smoothly its spread is next to nothing, and a threshold in units of that would fire at any change. So the
# spread is taken for no less than this share of the median. Norms vary more: in the demo by 3 times, losses by 1.7.
_LEAST_SPREAD = {"loss": 0.05, "gradient norm": 0.2}


class SpikeWatch:
    """Judges steps, and remembers what came of it.

    Args:
        config: Section ``train`` of the config.
        state: What :meth:`to_json` gave; None or empty: of a run that begins, or whose checkpoint has none.

    Attributes:
        in_a_row: The last steps, if they were spikes and were skipped.
        past: Steps that are not trained on, since the run has gone back to before them.
        rollbacks: How often it has.
        rollbacks_in_a_row: Those since the last checkpoint of a step behind all of ``past``.

    Raises:
        CheckpointError: ``state`` is not of that form.
    """

    def __init__(self, config: TrainConfig, state: dict[str, Any] | None = None):
        self._threshold = config.spike_threshold
        self._recent = {what: deque[float](maxlen=config.spike_window) for what in _LEAST_SPREAD}
        self.in_a_row: list[int] = []
        self.past: set[int] = set()
        self.rollbacks = self.rollbacks_in_a_row = 0
        if state:
            self._take_over(state)

    def what(self, loss: float, grad_norm: float) -> str | None:
        """In what a step is a spike, in words; None if it is not, or if fewer updates than a window holds were made."""
        for what, value in (("loss", loss), ("gradient norm", grad_norm)):
            limit = self._limit(what)
            if value > limit:
                return f"{what} {value:.6g}, more than {limit:.6g} (train.spike_threshold)"
        return None

    def updated(self, loss: float, grad_norm: float) -> None:
        """The step counts."""
        self._recent["loss"].append(loss)
        self._recent["gradient norm"].append(grad_norm)
        self.in_a_row = []

    def go_past(self, steps: Iterable[int], before: SpikeWatch) -> None:
        """The run has gone back to before ``steps``; ``before`` knows of the times before, the checkpoint perhaps not."""
        self.past |= before.past | set(steps)
        self.rollbacks = before.rollbacks + 1
        self.rollbacks_in_a_row = before.rollbacks_in_a_row + 1

    def saved(self, step: int) -> None:
        """A checkpoint was made after ``step``: what comes from here on is not the trouble of before."""
        if not self.in_a_row and step > max(self.past, default=0):
            self.rollbacks_in_a_row = 0

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint: a few numbers, and two for each step of the window."""
        return {
            "losses": list(self._recent["loss"]),
            "norms": list(self._recent["gradient norm"]),
            "in_a_row": list(self.in_a_row),
            "past": sorted(self.past),
            "rollbacks": [self.rollbacks, self.rollbacks_in_a_row],
        }

    def _take_over(self, state: dict[str, Any]) -> None:
        try:
            floats = [state["losses"], state["norms"]]
            counts = [state["in_a_row"], state["past"], state["rollbacks"]]
            if not all(type(n) is float and math.isfinite(n) for row in floats for n in row):
                raise TypeError("not a number")
            if not all(type(n) is int and n >= 0 for row in counts for n in row):
                raise TypeError("not a step")
            for recent, values in zip(self._recent.values(), floats, strict=True):
                recent.extend(values)
            self.in_a_row, self.past = list(state["in_a_row"]), set(state["past"])
            self.rollbacks, self.rollbacks_in_a_row = state["rollbacks"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"checkpoint: its record of loss spikes is malformed ({error}); take another") from error

    def _limit(self, what: str) -> float:
        recent = self._recent[what]
        if not self._threshold or len(recent) < (recent.maxlen or 0):
            return math.inf
        median = statistics.median(recent)
        spread = _TO_SIGMA * statistics.median(abs(value - median) for value in recent)
        return median + self._threshold * max(spread, _LEAST_SPREAD[what] * abs(median))
