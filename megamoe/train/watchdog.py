"""End a rank that makes no progress, with the stacks of its threads in its log: a hang becomes a restart.

The training thread only says which phase it is in, which costs an assignment. A thread of the watchdog's own counts for
how long that has not changed. It counts its own naps and does not look at a clock: a process that was stopped and goes
on, or a machine that slept for a while, has not hung.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

from megamoe.core.exit_status import HUNG
from megamoe.core.log import say
from megamoe.core.rank_end import report_end

SLOW = 10
"""Start-up (the first step included: kernels are compiled, shards fetched) and saving may take so many times longer."""

_NAPS = 20  # per time limit: a hang is noticed at most a twentieth too late


@dataclass(frozen=True, eq=False)
class _Phase:
    """What the training thread does; each is an object of its own, so that the same phase entered again is progress."""

    name: str
    step: int
    slow: bool


class Watchdog:
    """Watches over this process from now until it ends.

    SIGUSR2 writes the stacks of all threads to the log at any time, also while the process hangs.

    Args:
        rank: this rank, for what is said.
        seconds: a phase that takes longer is a hang; 0: nothing is watched.
    """

    def __init__(self, rank: int, seconds: float) -> None:
        self._rank, self._seconds = rank, seconds
        self._starting = True
        self._phase = _Phase("in start-up", 0, slow=True)
        # The log of rank 0: its stderr is a person's terminal.
        path = os.environ.get("MEGAMOE_LOG")
        self._log = open(path, "a", encoding="utf-8") if path is not None else sys.stderr  # noqa: SIM115 - open to the end
        faulthandler.register(signal.SIGUSR2, file=self._log, all_threads=True)
        if seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, phase: str, step: int, slow: bool = False) -> None:
        """Note that the training thread begins ``phase`` of ``step``: that is progress.

        Args:
            phase: what it will wait in, in words for people.
            step: the step under way.
            slow: it may take ten times as long.
        """
        self._phase = _Phase(phase, step, slow or self._starting)

    def started(self) -> None:
        """Note that the first step is done: from here on a step takes as long as the one before."""
        self._starting = False

    def _watch(self) -> None:
        nap = self._seconds / _NAPS
        seen, waited = self._phase, 0.0
        while True:
            limit = self._seconds * (SLOW if seen.slow else 1)
            # A hang that holds the interpreter lock stops this thread as well; a thread in C ends the process then.
            faulthandler.dump_traceback_later(limit + self._seconds, exit=True, file=self._log)
            time.sleep(nap)
            if self._phase is not seen:
                seen, waited = self._phase, 0.0
                continue
            waited += nap
            if waited >= limit:
                self._end(seen, limit)

    def _end(self, phase: _Phase, limit: float) -> None:
        faulthandler.dump_traceback(self._log, all_threads=True)
        where = f"in step {phase.step}: {phase.name}" if phase.step else phase.name
        said = (
            f"rank {self._rank} hangs {where}; no progress for {limit:g} s "
            f"(train.watchdog_seconds{f' x {SLOW}' if phase.slow else ''}), stacks above"
        )
        say(said, self._log)
        report_end(HUNG, said, phase=phase.name, step=phase.step)
        os._exit(HUNG)
