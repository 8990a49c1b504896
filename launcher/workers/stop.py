"""Stop the ranks of a run: let them save, wait for it, and say what came of it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection, Sequence

from launcher.workers.rank_group import POLL, RankGroup
from launcher.workers.run_progress import RunState
from megamoe.core.exit_status import STOP_FAILED, STOP_SIGNALS, STOPPED, STOPPED_TWICE, signal_name

# A rank that was killed by such a signal had not yet begun to listen for it.
_AS_ASKED = frozenset({STOPPED, *(-number for number in STOP_SIGNALS)})
_ASKED = _AS_ASKED | {STOP_FAILED, STOPPED_TWICE}


def asked_to_stop(ranks: RankGroup) -> bool:
    """Return whether a rank has ended because somebody asked it, or one of its peers, to stop."""
    return not _ASKED.isdisjoint(ranks.ended().values())


def stop_words(caught: Sequence[int]) -> str:
    """Say that the ranks save and stop, since these signals came; none: since a rank was asked to stop."""
    if caught:
        return f"{signal_name(caught[0])}: the ranks save and stop; Ctrl-C now ends them at once"
    return "a rank was asked to stop: all save and stop"


def stop_ranks(ranks: RankGroup, caught: Callable[[], Sequence[int]], grace: float) -> bool:
    """Ask all ranks to save and end, and wait for it, at most ``grace`` seconds and until Ctrl-C comes on top.

    Only SIGINT is a person who does not want to wait. A batch system sends SIGUSR1, later SIGTERM, and a session that ends
    SIGTERM and SIGHUP together: these mean the same as one.

    Args:
        ranks: those that are to stop.
        caught: gives the signals that have asked for it so far, the first one included.
        grace: seconds.

    Returns:
        Whether all have ended by themselves.
    """
    ranks.signal(signal.SIGTERM)  # those that know already do not mind
    deadline = time.monotonic() + grace
    while signal.SIGINT not in caught()[1:] and time.monotonic() < deadline:
        if ranks.wait(POLL):
            return True
    return False


def stop_status(statuses: Collection[int], caught: Sequence[int], by_themselves: bool, state: RunState) -> tuple[int, str]:
    """Return the launcher's exit status after a stop and what it says; no words when the run is done anyway."""
    if not any(statuses):
        return 0, ""
    if by_themselves and (_AS_ASKED.issuperset(status for status in statuses if status) or state.reached <= state.saved):
        return STOPPED, f"stopped and saved at step {state.saved}" if state.saved else "stopped; nothing was lost"
    kept = f"the last checkpoint is of step {state.saved}" if state.saved else "there is no new checkpoint"
    return 128 + (caught[0] if caught else signal.SIGTERM), f"stopped at step {state.reached} without a save; {kept}"
