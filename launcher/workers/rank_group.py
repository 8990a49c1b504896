"""The interface of a launcher to the ranks of one attempt, wherever they run."""

from __future__ import annotations

import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from megamoe.core.exit_status import HUNG, REQUEST_IS_WRONG
from megamoe.core.rank_end import RankEnd, read_end
from megamoe.core.run_folder import AttemptFolder

POLL = 0.02  # seconds; a death is noticed within it
SETTLE = 0.2  # seconds that the peers of a failed rank get to fail as well, before one is blamed


class RankGroup(ABC):
    """Running ranks, numbered from 0 over all nodes.

    Attributes:
        folder: holds the logs and the reports of how the ranks ended.
        logs: log file of each rank.
        pids: process id of each rank on its node.
    """

    folder: AttemptFolder
    logs: dict[int, Path]
    pids: dict[int, int]

    @abstractmethod
    def ended(self) -> Mapping[int, int]:
        """Return the exit status of each rank that has ended, in the order of their ends; negative numbers are signals."""

    @abstractmethod
    def signal(self, signum: int) -> None:
        """Send ``signum`` to the ranks themselves, not to their children."""

    @abstractmethod
    def frozen(self) -> Mapping[int, list[int]]:
        """Return the stopped processes (SIGSTOP, a debugger): rank -> process ids in its session, data workers included."""

    @abstractmethod
    def pause(self, seconds: float) -> None:
        """Let time pass."""

    def running(self) -> bool:
        """Return whether some rank is still at work and none has failed."""
        ended = self.ended()
        return len(ended) < len(self.logs) and not any(ended.values())

    def culprit(self) -> tuple[int, int] | None:
        """Return (rank, exit status) of the rank that took the others down; None when none failed.

        The first death is followed at once by those of ranks whose peer has gone, and may not be the first to be seen.
        So a wrong request comes first, then a signal from outside, then a hang, then what a lost peer may look like as
        well: an abort or a plain failure, the earliest of them.
        """
        if any(self.ended().values()):
            self.pause(SETTLE)
        failed = [(rank, status) for rank, status in self.ended().items() if status]
        return min(failed, key=lambda item: _severity(item[1]), default=None)

    def end_of(self, rank: int) -> RankEnd | None:
        """Return how a rank says that it has ended; None if it left no report, or one that its exit status belies.

        A rank that was killed by a signal just after its report was about to end by itself: its report counts.
        """
        status = self.ended().get(rank)
        if status is None or rank not in self.pids:
            return None
        end = read_end(self.folder.end(rank), self.pids[rank])
        return end if end is not None and (status < 0 or status == end.status) else None

    def wait(self, seconds: float) -> bool:
        """Give all ranks ``seconds`` to end; return whether they have."""
        deadline = time.monotonic() + seconds
        while len(self.ended()) < len(self.logs):
            if time.monotonic() > deadline:
                return False
            self.pause(POLL)
        return True


def _severity(status: int) -> int:
    if status == REQUEST_IS_WRONG:
        return 0
    if status < 0 and status not in (-signal.SIGABRT, -signal.SIGTERM):
        return 1
    return 2 if status == HUNG else 3
