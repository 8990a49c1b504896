"""Worker processes of a rank: forked from a small server process that has imported what they need once for all of them.

Not torch's ``DataLoader``, whose workers import torch, and not a fork of the rank itself, which has threads and a GPU.
The rank starts the server with ``python -c``, hands it the work in shared memory, a pipe per worker, and shared memory
for what they make. A worker makes an item for each message that it gets. All of them end when the rank closes
the pipe that it holds for that, or dies.
"""

from __future__ import annotations

import gc
import mmap
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NoReturn, Protocol

from megamoe.core.child import end_with_parent
from megamoe.core.exit_status import how_it_ended
from megamoe.data.shards.storage import MOST_FILES

_DEAF_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_GRACE = 5.0  # seconds for a process that was killed to be gone
_ENVIRONMENT = {
    # Of two processes that each use all cores for one product of matrices, neither would gain
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    # Else glibc returns the memory of each picture to the system, which hands out that of the next one page by page: a
    # seventh of the time for pictures that are scaled down. Now a worker keeps up to 16 MB.
    "MALLOC_MMAP_THRESHOLD_": str(8 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 20),
}


class Work(Protocol):
    """What the workers do. It is pickled, so it must be importable without the main module."""

    def preload(self) -> None:
        """Import what is needed, before the workers are forked."""

    def serve(self, worker: int, workers: int, memory: mmap.mmap) -> Iterator[Any]:
        """The items of one worker, which may leave part of them in its place in ``memory``."""


@dataclass(frozen=True)
class _Raised:
    """An error in a worker that is no :class:`~megamoe.core.errors.DataError`."""

    text: str


class WorkerDied(RuntimeError):
    """A worker process ended, or failed; the message says which and how."""


class WorkerProcesses:
    """So many ``workers``, a process each; close it in the end.

    Attributes:
        memory: what all of them share with this process. It stays mapped as long as anybody holds a view of it.

    Args:
        work: what they do.
        workers: how many.
        size: bytes of ``memory``.
        ahead: items that a worker makes before they are asked for.
    """

    def __init__(self, work: Work, workers: int, size: int, ahead: int) -> None:
        job = pickle.dumps(work, pickle.HIGHEST_PROTOCOL)
        blocks = [_shared(max(1, size)), _shared(len(job))]
        self.memory, content = (mmap.mmap(block, 0) for block in blocks)
        content[:] = job
        theirs, self._life = Pipe(duplex=False)
        self._report, said = Pipe(duplex=False)
        pairs = [Pipe() for _ in range(workers)]
        self._pipes = [ours for ours, _ in pairs]
        handed = [theirs.fileno(), said.fileno(), *blocks, *(pipe.fileno() for _, pipe in pairs)]
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from megamoe.data.loader.processes import serve; serve(*{handed!r})"
        )
        with _deaf():
            self._server = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=handed, env={**os.environ, **_ENVIRONMENT}
            )
        for each in (theirs, said, *(pipe for _, pipe in pairs)):
            each.close()
        for block in blocks:
            os.close(block)
        self._pids: list[int] = []
        self._ended: dict[int, int] = {}  # worker -> exit code
        for pipe in self._pipes:
            with suppress(OSError):  # then it is told when something is received
                for _ in range(ahead):
                    pipe.send_bytes(b"")

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, once they run."""
        if not self._pids:
            self._look(_GRACE * 12)
        return self._pids

    def receive(self, worker: int) -> Any:
        """The next item of a worker, which begins with another one.

        Raises:
            WorkerDied: it is dead, or an error was raised in it.
        """
        pipe = self._pipes[worker]
        try:
            item = pipe.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied(self._how(worker)) from error
        if isinstance(item, _Raised):
            raise WorkerDied(f"data worker {worker} failed:\n{item.text}")
        with suppress(OSError):  # the next call will tell
            pipe.send_bytes(b"")
        return item

    def close(self) -> None:
        """End the workers, whatever they do at the moment."""
        self._life.close()
        try:
            self._server.wait(2 * _GRACE)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        for pipe in (self._report, *self._pipes):
            pipe.close()

    def _how(self, worker: int) -> str:
        while worker not in self._ended and self._look(1.0):
            pass
        if not self._pids:
            return f"the data workers could not be started (exit code {self._server.poll()}); the reason is above"
        code = self._ended.get(worker)
        return (
            f"data worker {worker} (pid {self._pids[worker]}) {'died' if code is None else how_it_ended(code)}; "
            "if it was killed for memory, lower data.workers or data.prefetch"
        )

    def _look(self, seconds: float) -> bool:
        """Take one report of the server; whether there was one."""
        try:
            if not self._report.poll(seconds):
                return False
            pids, ended = self._report.recv()
        except (EOFError, OSError):
            return False
        self._pids, self._ended = pids, ended
        return True


def serve(life: int, report: int, block: int, job: int, *pipes: int) -> None:
    """The server: fork the workers, say how they end, and end with the rank.

    Args:
        life: read end of a pipe that the rank holds open.
        report: write end of a pipe for what becomes of the workers.
        block: the memory that all share.
        job: that of the work.
        pipes: one of each worker.
    """
    # What asks a training to stop is not meant for its workers: it needs them to finish its step and save
    for number in _DEAF_TO:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _DEAF_TO)
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if most == resource.RLIM_INFINITY else min(most, MOST_FILES)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))  # a worker may have many shards open
    alive = Connection(life, writable=False)
    with mmap.mmap(job, 0) as content:
        work: Work = pickle.loads(content)
    work.preload()
    gc.collect()
    gc.freeze()  # the collector writes to what it looks at, and pages that are written to are shared no longer
    pids = []
    for worker in range(len(pipes)):
        pid = os.fork()
        if not pid:
            for other, pipe in enumerate(pipes):
                if other != worker:
                    os.close(pipe)
            os.close(report)
            _work(work, worker, len(pipes), mmap.mmap(block, 0), Connection(pipes[worker]), alive)
        pids.append(pid)
    for pipe in pipes:
        os.close(pipe)
    end_with_parent(lambda: wait([alive]), lambda: _kill_late(pids))
    _tell_ends(Connection(report, readable=False), pids)


def _tell_ends(report: Connection, pids: list[int]) -> None:
    ended: dict[int, int] = {}
    with suppress(OSError):
        report.send((pids, ended))
    while len(ended) < len(pids):
        pid, status = os.wait()
        ended[pids.index(pid)] = os.waitstatus_to_exitcode(status)
        with suppress(OSError):
            report.send((pids, ended))


def _work(work: Work, worker: int, workers: int, memory: mmap.mmap, pipe: Connection, alive: Connection) -> NoReturn:
    end_with_parent(lambda: wait([alive]))
    try:
        for item in work.serve(worker, workers, memory):
            pipe.recv_bytes()
            pipe.send(item)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # nobody asks any more
        pass
    except BaseException:
        with suppress(OSError):
            pipe.send(_Raised(traceback.format_exc()))
    os._exit(0)


def _kill_late(workers: list[int]) -> None:
    # They end in the same way, and the server when they are gone. One that cannot, since it was stopped, is the reason
    # why the rank has ended: the launcher looks for it, so it must not be gone at once.
    time.sleep(_GRACE)
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _shared(size: int) -> int:
    """A file in memory. It needs no room in /dev/shm, which containers often have little of."""
    block = os.memfd_create("megamoe-data")
    os.ftruncate(block, size)
    return block


class _deaf:
    """A process that is started in the body begins with these signals blocked, until it ignores them."""

    def __enter__(self) -> None:
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, _DEAF_TO)

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)
