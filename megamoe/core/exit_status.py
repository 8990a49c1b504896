"""Exit statuses of ranks and launchers, by which the caller knows what to do next, and words for them.

Listed for users in docs/faults.md. 75 and above 128 follow sysexits.h and the shells; 0, 1 and 2 are everybody's.
"""

from __future__ import annotations

import signal

FAILED = 1
"""A failure while running; for the launcher: and no restart was left."""

REQUEST_IS_WRONG = 2
"""Said in one line on stderr; the same request fails again."""

STOPPED = 75
"""Was asked to stop; nothing is lost, and the same command with ``--resume auto`` goes on (EX_TEMPFAIL)."""

HUNG = 76
"""Of a rank: no progress for too long, so it wrote the stacks of its threads and ended itself."""

NO_PROGRESS = 77
"""Of the launcher: restart after restart ended at the same step."""

STOP_FAILED = 128 + signal.SIGTERM
"""Of a rank: was asked to stop and could not save in time, since a peer hangs or the save takes too long."""

STOPPED_TWICE = 128 + signal.SIGINT
"""Of a rank: a second Ctrl-C did not let it save."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What asks a rank to save and stop. SIGUSR1 is what batch systems send before the time limit."""


def signal_name(number: int) -> str:
    """Return the name of a signal: ``SIGTERM`` for 15."""
    try:
        return signal.Signals(number).name
    except ValueError:  # the real-time signals have no names
        return f"signal {number}"


def how_it_ended(status: int) -> str:
    """Say how a process ended, by its exit status or, where that is negative, the signal that killed it.

    ``was killed by SIGKILL`` for -9, ``ended with status 1`` for 1.
    """
    return f"was killed by {signal_name(-status)}" if status < 0 else f"ended with status {status}"
