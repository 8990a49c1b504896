"""Notices that all ranks are stopped (SIGSTOP, a debugger): then no watchdog of any rank is left that could say so."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

_NAP = 1.0  # seconds between two looks; each reads a file of /proc per rank


class AllStopped:
    """Counts for how long the main processes of all ranks have been stopped.

    It counts its own naps and looks at no clock: a machine that slept, or a launcher that was stopped together with its
    ranks (as SLURM suspends a job), has waited for nothing.

    Args:
        pids: process ids of the ranks.
        seconds: how long they may be stopped; 0: for ever.
    """

    def __init__(self, pids: Collection[int], seconds: float) -> None:
        self._pids, self._limit = pids, seconds
        self._waited, self._since_look = 0.0, 0.0

    def too_long(self, nap: float) -> bool:
        """Whether they have been stopped for too long; called every ``nap`` seconds."""
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
