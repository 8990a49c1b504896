"""The agent's part of the checks before an attempt: its own node once more, and its links to the others."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock, Thread

from launcher.elastic.messages import Message, Wire
from launcher.health.collective import CANNOT
from launcher.health.connections import meet
from launcher.workers.output import last_lines
from launcher.workers.placement import Place, environment

ONCE_MORE = 3.0  # seconds before a second look; by then the memory of ranks that have just ended is free
MOST_PAIRS = 1000  # named in a message; a network with more has no single culprit
SAID = 2000  # characters of a failed program's last lines


class Probe:
    """Answers ``meet`` and ``measure`` of the supervisor, each from a thread of its own.

    ``met`` carries ``check``, ``problems`` (of this node, one line each), ``error`` and, from the first node,
    ``missing`` and ``unreachable``. ``measured`` carries ``check``, ``status``, ``said`` (why it failed) and, from the
    first node, ``report``.

    Args:
        checks: as of :func:`launcher.elastic.agent.run_agent`.
        log: what the collective says.
    """

    def __init__(self, checks: Callable[[], Sequence[str]], log: Path) -> None:
        self._checks, self._log = checks, log
        self._lock = Lock()
        self._processes: list[subprocess.Popen[str]] = []

    def meet(self, message: Message, wire: Wire) -> None:
        """Meet the others, and look at this node."""
        Thread(target=self._meet, args=(message, wire), daemon=True).start()

    def measure(self, message: Message, wire: Wire) -> None:
        """Take part in the collective."""
        self.close()
        with self._lock:
            try:
                self._start(message)
            except OSError as error:
                wire.send("measured", check=message["check"], status=1, said=str(error))
                return
            Thread(target=self._wait, args=(message, wire, list(self._processes)), daemon=True).start()

    def close(self) -> None:
        """End what still runs."""
        with self._lock:
            for process in self._processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            self._processes = []

    def _meet(self, message: Message, wire: Wire) -> None:
        place, found, error = Place(**message["place"]), {}, ""
        try:
            met = meet(place.node, place.world, place.master, place.port, float(message["seconds"]))
            if met is not None:
                found = {"missing": met.missing, "unreachable": met.unreachable[:MOST_PAIRS]}
        except (OSError, ValueError, TypeError, KeyError) as failure:
            error = str(failure) or type(failure).__name__
        problems = list(self._checks())
        if problems:
            time.sleep(ONCE_MORE)
            problems = list(self._checks())
        wire.send("met", check=message["check"], problems=problems, error=error, **found)

    def _start(self, message: Message) -> None:
        place = Place(**message["place"])
        limits = [str(float(message[name])) for name in ("seconds", "slow", "bandwidth")]
        cores = len(os.sched_getaffinity(0)) // place.ranks
        with self._log.open("w") as log:
            for local in range(place.ranks):
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "launcher.health.collective", *limits],
                        env=environment(os.environ, place, local, cores),
                        stdin=subprocess.PIPE,  # its end tells the program that this agent is gone
                        stdout=subprocess.PIPE if place.first + local == 0 else log,
                        stderr=log,
                        text=True,
                        start_new_session=True,
                    )
                )

    def _wait(self, message: Message, wire: Wire, processes: list[subprocess.Popen[str]]) -> None:
        output = processes[0].stdout
        report = "" if output is None else output.read()
        # A process that failed by itself decides; the others may only have lost it.
        statuses = [process.wait() for process in processes]
        status = CANNOT if CANNOT in statuses else next(filter(None, statuses), 0)
        said = "" if status == 0 else " / ".join(last_lines(self._log, 3))[-SAID:]
        wire.send("measured", check=message["check"], status=status, said=said, report=report)
