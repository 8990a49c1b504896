"""The guard: a process that ends the ranks when their launcher is killed with SIGKILL.

A launcher that gets SIGKILL cannot clean up. The death of a parent ends its direct children at best, not the data
workers of those children. So the launcher starts this file as a process in a session of its own and holds the other end
of its standard input. End of input means that the launcher is gone, however it ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from types import TracebackType

_TRACKER = b"multiprocessing.resource_tracker"
_TRACKER_GRACE = 5.0  # seconds; on a machine that is not overloaded it needs milliseconds


class Guard:
    """The launcher's end: tells the guard process which process groups must die with the launcher."""

    def __init__(self) -> None:
        # -I -S: this process needs nothing but the standard library and has to be up in milliseconds.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def watch(self, groups: Iterable[int]) -> None:
        """Replace the set of process groups; an empty one when they have ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody killed the guard: the launcher still does its own part
            self._process.stdin.write((" ".join(map(str, groups)) + "\n").encode())
            self._process.stdin.flush()

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Read sets of process groups, one per line, until the launcher is gone; then kill the last set."""
    groups: list[int] = []
    for line in sys.stdin:
        groups = [int(word) for word in line.split()]
    kill_groups(groups)


def kill_groups(groups: Collection[int]) -> None:
    """Kill all processes of process groups, and leave nothing of theirs in shared memory.

    The semaphores between a rank and its data workers have names in /dev/shm. When a process is killed, Python's resource
    tracker of that rank removes them, if it is not killed along: it ends by itself when all others of its group are gone.
    """
    deadline = time.monotonic() + _TRACKER_GRACE
    while (members := _members(groups)) and time.monotonic() < deadline:
        for process, is_tracker in members.items():
            if not is_tracker:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    for group in groups:  # whatever is left, and all of them where there is no /proc
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def _members(groups: Collection[int]) -> dict[int, bool]:
    """Return the processes of ``groups`` that have not ended, and whether each is a resource tracker."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            # The fields after the name, which may contain anything: state, parent, process group.
            state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(group) in groups and state not in "ZX":
                found[int(entry.name)] = _TRACKER in (entry / "cmdline").read_bytes()
    return found


if __name__ == "__main__":
    main()
