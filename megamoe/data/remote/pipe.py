"""Read shards from the standard output of a command."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from megamoe.core.exit_status import how_it_ended
from megamoe.core.urls import one_line
from megamoe.data.remote.stream import CHUNK, Interrupted, Patience, Refused, Stream

_TAIL = 4096  # bytes kept of what the command says on stderr
_SHELL_FAILED = (126, 127)  # not executable, not found


@contextmanager
def open_pipe(url: str, offset: int, identity: str | None, patience: Patience) -> Iterator[Stream]:
    """Run the command of ``pipe:COMMAND`` in a shell, as webdataset does, always from the first byte.

    The stream is complete only if the command exits with status 0. When the stream is closed, the command and its
    children are killed if they still run.
    """
    process = subprocess.Popen(
        url.removeprefix("pipe:"),
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # its own process group, which can be killed as a whole
    )
    assert process.stdout is not None and process.stderr is not None
    said = _LastLine(process.stderr)
    try:
        yield Stream(0, None, None, _chunks(process, process.stdout, said, patience))
    finally:
        if process.returncode is None:  # not reaped yet, so the id still belongs to it
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
        said.close()


def _chunks(process: subprocess.Popen[bytes], output: IO[bytes], said: _LastLine, patience: Patience) -> Iterator[bytes]:
    with selectors.DefaultSelector() as ready:
        ready.register(output, selectors.EVENT_READ)
        while True:
            if not ready.select(patience.read):
                raise Interrupted(f"the command wrote nothing for {patience.read:g} s")
            data = os.read(output.fileno(), CHUNK)
            if not data:
                break
            yield data
    try:
        status = process.wait(patience.read)
    except subprocess.TimeoutExpired as error:
        raise Interrupted(f"the command closed its output but did not end within {patience.read:g} s") from error
    if status:
        reason = one_line(f"the command {how_it_ended(status)}: {said.line() or 'it said nothing'}")
        if status in _SHELL_FAILED:
            raise Refused(reason, "check the command")
        raise Interrupted(reason)


class _LastLine:
    """Drain a command's stderr, so that it never blocks, and keep its end."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._tail = b""
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    def line(self) -> str:
        self._thread.join(1.0)  # a child may still hold stderr open; what came so far is enough
        lines = self._tail.decode("utf-8", "replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        self._thread.join(1.0)
        if not self._thread.is_alive():
            self._stream.close()

    def _drain(self) -> None:
        while data := os.read(self._stream.fileno(), _TAIL):
            self._tail = (self._tail + data)[-_TAIL:]
