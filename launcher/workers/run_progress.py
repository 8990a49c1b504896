"""How far a run has come, read from its folder, and whether restarting it still helps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from launcher.workers.output import Terminal
from megamoe.config.schema import LaunchConfig
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
    """The state of a run; what is older than ``launched`` (seconds since the epoch) may be of a history left behind."""
    run = RunFolder(run_dir)
    reached = _last_step(run.metrics) if run.metrics.exists() and run.metrics.stat().st_mtime >= launched else 0
    written = {step: path for step, path in run.complete_checkpoints().items() if path.stat().st_mtime >= launched}
    saved = max(written, default=0)
    return RunState(reached, saved, written.get(saved))


class Restarts:
    """Counts restarts and says when to give up.

    Two counts, since they mean different things. Restarts without a step that is later than all before: the run does
    not get past some step, and never will. Restarts since the last new checkpoint: the run comes further each time, but
    what it does is lost again.

    Attributes:
        count: restarts since the last new checkpoint.
    """

    def __init__(self, limits: LaunchConfig) -> None:
        self._limits = limits
        self._furthest: int | None = None
        self._saved = 0
        self._ends: list[str] = []  # how the attempt that came furthest ended, and all since
        self.count = 0

    def after(self, state: RunState, culprit: tuple[int, int], what: str, run_dir: Path, terminal: Terminal) -> int | None:
        """A rank has failed: count it, and say that ``what`` comes now, or why nothing does.

        Args:
            state: how far the run has come.
            culprit: the rank that failed, with its exit status.
            what: would be started.
            run_dir: the run's folder.
            terminal: to say it to.

        Returns:
            Exit status of the launcher; None when it is to restart the ranks.
        """
        rank, status = culprit
        if status == REQUEST_IS_WRONG:
            return status
        self.note(state, f"rank {rank} {how_it_ended(status)}")
        if why := self.stuck():
            terminal.say(f"{why}; the logs are in {run_dir / 'logs'}")
            return NO_PROGRESS
        if not self.left():
            terminal.say(f"giving up after {self.count} restarts since the last checkpoint (launch.max_restarts)")
            return FAILED
        self.count += 1
        limit = self._limits.max_restarts
        terminal.say(f"restart {self.count} of at most {limit} since the last checkpoint: {what}")
        return None

    def note(self, state: RunState, how: str) -> None:
        """An attempt has ended at ``state``, since ``how``."""
        if self._furthest is None or state.reached > self._furthest:
            self._furthest, self._ends = state.reached, []
        self._ends.append(how)
        if state.saved > self._saved:
            self._saved, self.count = state.saved, 0

    def stuck(self) -> str | None:
        """What to say if restarts have brought the run no further."""
        restarts = len(self._ends) - 1
        if restarts < self._limits.max_restarts_without_progress:
            return None
        times = "a restart" if restarts == 1 else f"{restarts} restarts in a row"
        return f"no progress: {times} came no further than step {self._furthest} ({', then '.join(self._ends)})"

    def left(self) -> bool:
        """Whether one more is allowed."""
        return self.count < self._limits.max_restarts


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
