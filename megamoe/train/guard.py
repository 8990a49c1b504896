"""The guard around each step: judge what was computed, then apply, retry, skip, go back or stop.

NaN and loss spikes share one way. A step that must not be applied leaves weights and moments untouched and is computed once
more, so a transient fault leaves no trace. If the fault comes again, all ranks skip the step. Too many spikes in a row mean
that the weights themselves are at fault: the run goes back to a checkpoint from before them (:mod:`megamoe.train.rollback`)
and skips the steps that led there. Everything is judged by values that are equal on all ranks, so all ranks act alike.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

from megamoe.config.training import TrainConfig
from megamoe.core.errors import CheckpointError, NonFiniteError
from megamoe.metrics.counters import Counters
from megamoe.train.spikes import SpikeDetector

if TYPE_CHECKING:  # it imports DeepSpeed, which takes seconds
    from megamoe.parallel.deepspeed.engine import StepResult

Accepts: TypeAlias = "Callable[[StepResult], bool]"
"""Whether to make the update of a step."""

Attempt: TypeAlias = "Callable[[Accepts], StepResult]"
"""Compute the step; if its loss and norm are finite, ask the given function before its update."""


class Fault(Enum):
    """Why a computed step must not be applied."""

    NOT_FINITE = "loss or gradient norm is NaN or infinite"
    SPIKE = "loss or gradient norm is far above those of the last updates"
    PASSED_OVER = "the run went back to before this step and skips it"


class Action(Enum):
    """What to do with a computed step."""

    APPLY = "apply it"
    RETRY = "compute it once more"
    SKIP = "go on without its update"
    GO_BACK = "skip it, then go back to a checkpoint from before the spikes"
    STOP = "end the run"


def judge(fault: Fault | None, tries: int, skipped_in_a_row: int, spikes_in_a_row: int, limits: TrainConfig) -> Action:
    """Decide about a computed step.

    Args:
        fault: What is wrong with it; None if nothing is.
        tries: How often it has been computed.
        skipped_in_a_row: Steps before it that were skipped because they were not finite, since the last update.
        spikes_in_a_row: Steps before it that were skipped as spikes, since the last update.
        limits: ``max_skipped`` and ``max_spikes`` of the config's section ``train``.
    """
    if fault is None:
        return Action.APPLY
    if fault is not Fault.PASSED_OVER and tries == 1:
        return Action.RETRY
    if fault is Fault.NOT_FINITE and skipped_in_a_row >= limits.max_skipped:
        return Action.STOP
    spikes = spikes_in_a_row + (fault is Fault.SPIKE)
    return Action.GO_BACK if spikes > limits.max_spikes else Action.SKIP


@dataclass(frozen=True)
class Outcome:
    """What became of a step.

    Attributes:
        result: The last computation.
        action: APPLY, SKIP or GO_BACK.
        fault: Why it was not applied; None if it was.
        reason: The same in words, with the values; empty if it was applied.
        tries: How often it was computed.
    """

    result: StepResult
    action: Action
    fault: Fault | None
    reason: str
    tries: int

    @property
    def applied(self) -> bool:
        """Whether the update was made."""
        return self.action is Action.APPLY

    def count(self, counters: Counters, tokens: int, samples: int) -> Counters:
        """Return the counters after this step of ``tokens`` and ``samples``."""
        counters = counters.plus(step=1, recomputed=self.tries - 1)
        if self.fault is None:
            return replace(counters.plus(tokens=tokens, samples=samples), skipped_in_a_row=0)
        if self.fault is Fault.NOT_FINITE:
            return counters.plus(skipped=1, skipped_in_a_row=1)
        return counters.plus(spikes=1)


class Guard:
    """Judge each step, and remember what later judgements depend on.

    Args:
        limits: Section ``train`` of the config.
        state: What :meth:`to_json` returned; None or empty for a new run, or a checkpoint that has none.

    Attributes:
        spikes_in_a_row: Steps that were skipped as spikes since the last update.
        passed_over: Steps that are skipped because the run went back to before them.
        rollbacks: Rollbacks since the start of the run.
        rollbacks_in_a_row: Those since the last checkpoint of a step behind all of ``passed_over``.

    Raises:
        CheckpointError: ``state`` is malformed.
    """

    def __init__(self, limits: TrainConfig, state: Mapping[str, Any] | None = None):
        self.limits = limits
        self.spikes_in_a_row: list[int] = []
        self.passed_over: set[int] = set()
        self.rollbacks = self.rollbacks_in_a_row = 0
        self._detector = SpikeDetector(limits.spike_threshold, limits.spike_window)
        if state:
            self._restore(state)

    def compute(self, counters: Counters, attempt: Attempt) -> Outcome:
        """Compute the step after ``counters``, a second time if need be, and say what became of it.

        Raises:
            NonFiniteError: no step more than ``max_skipped`` in a row was finite.
        """
        step = counters.step + 1
        for tries in itertools.count(1):
            result = attempt(lambda result: self._fault(step, result) is None)
            fault = None if result.applied else self._fault(step, result)
            assert result.applied == (fault is None), "the engine applies what it may, and nothing else"
            action = judge(fault, tries, counters.skipped_in_a_row, len(self.spikes_in_a_row), self.limits)
            if action is not Action.RETRY:
                break
        reason = self._reason(fault, result)
        if action is Action.STOP:
            raise NonFiniteError(
                f"step {step}: {reason}, twice, and no update for {counters.skipped_in_a_row} steps before it "
                f"(train.max_skipped); lower optim.lr or look at the samples in the run's folder lost/"
            )
        if fault is None:
            self._detector.add(result.loss, result.grad_norm)
            self.spikes_in_a_row = []
        elif fault is Fault.SPIKE:
            self.spikes_in_a_row.append(step)
        return Outcome(result, action, fault, reason, tries)

    def pass_over(self, steps: Iterable[int], before: Guard) -> None:
        """Skip ``steps`` from now on: the run has gone back to before them.

        Args:
            steps: The spikes and the margin before them.
            before: The guard that found the spikes. The checkpoint may know nothing of the rollbacks that it counted.
        """
        self.passed_over |= before.passed_over | set(steps)
        self.rollbacks = before.rollbacks + 1
        self.rollbacks_in_a_row = before.rollbacks_in_a_row + 1

    def saved(self, step: int) -> None:
        """Note a checkpoint of ``step``. Behind all steps that are passed over, it ends the row of rollbacks."""
        if not self.spikes_in_a_row and step > max(self.passed_over, default=0):
            self.rollbacks_in_a_row = 0

    def to_json(self) -> dict[str, Any]:
        """Return the state for a checkpoint: a few numbers, and two for each step of the window."""
        losses, norms = self._detector.window
        return {
            "losses": losses,
            "norms": norms,
            "in_a_row": list(self.spikes_in_a_row),
            "past": sorted(self.passed_over),
            "rollbacks": [self.rollbacks, self.rollbacks_in_a_row],
        }

    def _fault(self, step: int, result: StepResult) -> Fault | None:
        if step in self.passed_over:
            return Fault.PASSED_OVER
        if not result.finite:
            return Fault.NOT_FINITE
        return Fault.SPIKE if self._detector.reason(result.loss, result.grad_norm) is not None else None

    def _reason(self, fault: Fault | None, result: StepResult) -> str:
        if fault is Fault.PASSED_OVER:
            return "passed over after a rollback"
        if fault is Fault.NOT_FINITE:
            return f"loss {result.loss}, gradient norm {result.grad_norm}"
        return self._detector.reason(result.loss, result.grad_norm) or ""

    def _restore(self, state: Mapping[str, Any]) -> None:
        try:
            floats = [state["losses"], state["norms"]]
            counts = [state["in_a_row"], state["past"], state["rollbacks"]]
            if not all(type(n) is float and math.isfinite(n) for row in floats for n in row):
                raise TypeError("not a number")
            if not all(type(n) is int and n >= 0 for row in counts for n in row):
                raise TypeError("not a step")
            self._detector.restore(*floats)
            self.spikes_in_a_row, self.passed_over = list(state["in_a_row"]), set(state["past"])
            self.rollbacks, self.rollbacks_in_a_row = state["rollbacks"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"checkpoint: its record of loss spikes is malformed ({error}); take another") from error
