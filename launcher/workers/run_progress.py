"""Read from a run's folder how far it has come, and judge whether restarting it still helps."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from megamoe.config.launch import LaunchConfig
from megamoe.core.exit_status import FAILED, NO_PROGRESS, REQUEST_IS_WRONG, how_it_ended
from megamoe.core.run_folder import RunFolder

_TAIL = 1 << 20  # bytes; the last records of metrics.jsonl are in them


@dataclass(frozen=True)
class RunState:
    """What a run's folder says.

    Attributes:
        reached: last step that metrics.jsonl records, if it was written since the launch; else 0.
        saved: step of the newest checkpoint written since the launch; 0 if there is none.
        checkpoint: its folder.
    """

    reached: int
    saved: int
    checkpoint: Path | None


def run_state(run_dir: Path, launched: float) -> RunState:
    """Return the state of a run. What is older than ``launched`` (seconds since the epoch) may be of another history."""
    run = RunFolder(run_dir)
    reached = _last_step(run.metrics) if run.metrics.exists() and run.metrics.stat().st_mtime >= launched else 0
    written = {step: path for step, path in run.complete_checkpoints().items() if path.stat().st_mtime >= launched}
    saved = max(written, default=0)
    return RunState(reached, saved, written.get(saved))


@dataclass(frozen=True)
class Restarts:
    """Counts restarts and says when to give up.

    It keeps two counts, since they mean different things. After restarts without a step later than all before, the run
    does not get past some step and never will. After restarts since the last new checkpoint, the run comes further each
    time, but its work is lost again.

    Attributes:
        limits: how many of each are allowed.
        count: restarts since the last new checkpoint.
        furthest: the last step that was ever reached; None before the end of the first attempt.
        saved: step of the newest checkpoint.
        ends: how the attempt that came furthest ended, and all since.
    """

    limits: LaunchConfig
    count: int = 0
    furthest: int | None = None
    saved: int = 0
    ends: tuple[str, ...] = ()

    def after(self, state: RunState, culprit: tuple[int, int], what: str, run_dir: Path) -> Verdict:
        """Judge whether to start the ranks again after one has failed.

        Args:
            state: how far the run has come.
            culprit: the rank that failed, with its exit status.
            what: would be started.
            run_dir: the run's folder.
        """
        rank, status = culprit
        if status == REQUEST_IS_WRONG:
            return Verdict(self, status)
        noted = self._note(state, f"rank {rank} {how_it_ended(status)}")
        if why := noted._stuck():
            return Verdict(noted, NO_PROGRESS, f"{why}; the logs are in {RunFolder(run_dir).logs}")
        limit = self.limits.max_restarts
        if noted.count >= limit:
            words = f"giving up after {noted.count} restarts since the last checkpoint (launch.max_restarts)"
            return Verdict(noted, FAILED, words)
        again = replace(noted, count=noted.count + 1)
        return Verdict(again, None, f"restart {again.count} of at most {limit} since the last checkpoint: {what}")

    def _note(self, state: RunState, how: str) -> Restarts:
        """Add an attempt that has ended at ``state``."""
        further = self.furthest is None or state.reached > self.furthest
        noted = replace(self, furthest=state.reached, ends=(how,)) if further else replace(self, ends=(*self.ends, how))
        return replace(noted, saved=state.saved, count=0) if state.saved > self.saved else noted

    def _stuck(self) -> str | None:
        """Say that restarts have brought the run no further, if so."""
        restarts = len(self.ends) - 1
        if restarts < self.limits.max_restarts_without_progress:
            return None
        times = "a restart" if restarts == 1 else f"{restarts} restarts in a row"
        return f"no progress: {times} came no further than step {self.furthest} ({', then '.join(self.ends)})"


@dataclass(frozen=True)
class Verdict:
    """Whether to start the ranks again.

    Attributes:
        restarts: the counts from now on.
        status: exit status of the launcher; None when the ranks are to be started again.
        words: what to say; empty when all is said.
    """

    restarts: Restarts
    status: int | None
    words: str = ""


def _last_step(metrics: Path) -> int:
    """Return the step of the last whole record; a line that is half written, or cut by the tail, is no JSON object."""
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - _TAIL))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            return int(record["step"])
    return 0
