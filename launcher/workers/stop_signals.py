"""Note signals that ask this process to stop, to be acted on later."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from megamoe.core.exit_status import STOP_SIGNALS


class StopSignals:
    """The signals that have come, oldest first."""

    def __init__(self) -> None:
        self._received: tuple[int, ...] = ()

    def note(self, number: int) -> None:
        """Add a signal."""
        self._received = (*self._received, number)

    @property
    def received(self) -> tuple[int, ...]:
        """All of them so far."""
        return self._received

    def __bool__(self) -> bool:
        return bool(self._received)


@contextlib.contextmanager
def caught_signals() -> Iterator[StopSignals]:
    """Note what asks to stop in place of dying from it. Under nohup SIGHUP stays ignored."""
    caught = StopSignals()
    before = {}
    for signum in (*STOP_SIGNALS, signal.SIGHUP):
        if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
            before[signum] = signal.signal(signum, lambda number, _: caught.note(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, before)  # one that came while this process was starting comes now
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
