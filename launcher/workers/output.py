"""Route the ranks' output: every rank to its log file, rank 0 to the terminal as well."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from pathlib import Path
from typing import IO, Protocol, TextIO


class Output(Protocol):
    """Where the output of rank 0 goes, besides its log."""

    def pass_on(self, data: bytes, to_stderr: bool) -> None:
        """Take bytes of rank 0 as they are, carriage returns included."""
        ...


class Terminal:
    """The launcher's stdout and stderr, shared by rank 0's bytes and the launcher's own lines."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._line_open = False  # a progress bar leaves the cursor at the end of its line

    def pass_on(self, data: bytes, to_stderr: bool) -> None:
        """Write bytes of rank 0 as they are, carriage returns included."""
        with self._lock:
            self._write(data, sys.stderr if to_stderr else sys.stdout)
            self._line_open = not data.endswith(b"\n")

    def say(self, text: str) -> None:
        """Write a line of the launcher's own to stderr, below an unfinished line of rank 0."""
        with self._lock:
            start = "\n" if self._line_open else ""
            self._write(f"{start}megamoe: {text}\n".encode(errors="backslashreplace"), sys.stderr)
            self._line_open = False

    @staticmethod
    def _write(data: bytes, stream: TextIO) -> None:
        with contextlib.suppress(OSError):  # the reader of a pipe has gone; the run and its logs go on
            stream.buffer.write(data)
            stream.flush()


class Tee:
    """Copies a pipe to a log file and to the terminal until all its writers have closed it."""

    def __init__(self, pipe: IO[bytes], log: Path, terminal: Output, to_stderr: bool) -> None:
        self._pipe, self._log, self._terminal, self._to_stderr = pipe, log, terminal, to_stderr
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the rest of the output; the writers have ended, so it is there."""
        self._thread.join(timeout=5)

    def _copy(self) -> None:
        with self._pipe, self._log.open("ab", buffering=0) as log:
            while data := os.read(self._pipe.fileno(), 65536):
                log.write(data)
                self._terminal.pass_on(data, self._to_stderr)


def last_lines(log: Path, count: int = 12) -> list[str]:
    """Return the last ``count`` lines of a log, to be quoted; each state of a progress bar is a line."""
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16384))
        text = file.read().decode(errors="replace")
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()][-count:]
