"""Notice that all ranks are stopped (SIGSTOP, a debugger), since none of their watchdogs can say so then."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

_NAP = 1.0  # seconds between two looks; each reads a file of /proc per rank


class AllStopped:
    """Counts for how long the main processes of all ranks have been stopped.

    It counts its own naps and does not look at a clock. So neither a machine that slept nor a launcher that was stopped
    together with its ranks (as when SLURM suspends a job) takes that time for a hang.

    Args:
        pids: process ids of the ranks.
        seconds: how long they may be stopped; 0: without limit.
    """

    def __init__(self, pids: Collection[int], seconds: float) -> None:
        self._pids, self._limit = pids, seconds
        self._waited, self._since_look = 0.0, 0.0

    def too_long(self, nap: float) -> bool:
        """Return whether they have been stopped for too long; call it every ``nap`` seconds."""
        self._since_look += nap
        if self._limit and self._since_look >= min(_NAP, self._limit):
            self._waited = self._waited + self._since_look if all(map(_is_stopped, self._pids)) else 0.0
            self._since_look = 0.0
        return bool(self._limit) and self._waited >= self._limit


def _is_stopped(pid: int) -> bool:
    try:
        # the state is what follows the name, which may contain anything
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:  # it has ended
        return False
