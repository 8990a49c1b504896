"""Handle a request to stop: note it at once, let the loop save at the next step, end the rank if it cannot.

Python runs its own signal handlers only between two instructions of the main thread, which never come while that thread
waits in a collective for a peer that hangs. So the C part of Python writes each signal to a socket (``set_wakeup_fd``)
and a thread reads it there: the request is noted, and the time for it runs, whatever the main thread does. The save
itself has to wait until the main thread is back from its collective.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import NoReturn

from megamoe.core.exit_status import STOP_FAILED, STOP_SIGNALS, STOPPED, STOPPED_TWICE, signal_name
from megamoe.core.log import say
from megamoe.core.rank_end import report_end


class StopRequest:
    """Takes over SIGTERM, SIGUSR1 and SIGINT until the process ends; made in the main thread.

    Until :meth:`started` a signal ends the process at once with status 75, since there is nothing to save. After that
    it sets ``asked``; if the process is still there ``grace`` seconds later, it ends with status 143. A second SIGINT,
    which only a person at a keyboard sends, ends it at once.

    Args:
        rank: this rank, for what is said.
        grace: seconds for the step under way and a checkpoint.

    Attributes:
        asked: whether to save and stop.
    """

    def __init__(self, rank: int, grace: float) -> None:
        self.asked = False
        self._rank, self._grace = rank, grace
        self._starting = True
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)  # a handler there must be, or the signal would end the process
            signal.siginterrupt(number, False)  # C libraries do not all expect an interrupted call
        threading.Thread(target=self._listen, name="stop", daemon=True).start()

    def started(self) -> None:
        """Note that from here on there is something to save."""
        self._starting = False

    def _listen(self) -> None:
        interrupts = 0
        while True:
            for number in self._reader.recv(64):
                if number not in STOP_SIGNALS:  # other handlers' signals come here too
                    continue
                interrupts += number == signal.SIGINT
                if self._starting:
                    self._end(STOPPED, f"{signal_name(number)} before the first step: nothing to save")
                if interrupts > 1:
                    self._end(STOPPED_TWICE, "SIGINT again: ends without a save")
                if not self.asked:
                    self.asked = True
                    self._say(f"{signal_name(number)}: saves and stops after the next step")
                    threading.Thread(target=self._limit, name="stop-limit", daemon=True).start()

    def _limit(self) -> None:
        time.sleep(self._grace)
        self._end(STOP_FAILED, f"could not save within launch.stop_grace {self._grace:g} s: ends without a save")

    def _end(self, status: int, why: str) -> NoReturn:
        self._say(why)
        report_end(status, f"rank {self._rank}: {why}")
        os._exit(status)  # the main thread cannot be asked: it may be in a collective

    def _say(self, text: str) -> None:
        say(f"rank {self._rank}: {text}")
