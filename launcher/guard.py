"""A process that outlives its launcher for a moment, to take the ranks down when the launcher was killed with -9.

A launcher that gets SIGKILL cannot clean up, and the death of a parent ends only its direct children at best, not the
data workers that these have started. So the launcher starts this file as a process of its own session and holds the
other end of its standard input. End of input means that the launcher is gone, by whatever way.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from types import TracebackType


class Guard:
    """The launcher's end: tells the guard process which process groups have to die with the launcher."""

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
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
