"""Run jobs in worker processes on this machine.

When a worker is killed, only its job runs again. All workers end with the process that started them, however it ends.
``ProcessPoolExecutor`` does neither: one death breaks the whole pool without naming the job, and workers outlive a
killed parent.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, NoReturn

from megamoe.core.child import end_with_parent
from megamoe.core.exit_status import how_it_ended

_ATTEMPTS = 3  # another process's memory may cost a worker once or twice; three times in a row, the job is the cause
_GRACE = 3.0  # seconds for a job to remove its unfinished file before its worker is killed
_context = get_context("forkserver")  # a fork of this process could inherit a lock that another thread holds


class JobKilledWorkersError(Exception):
    """A job killed several workers, one after the other; the message says how many and how."""


class WorkerPool:
    """Run as many jobs at a time as there are ``processes``. Close it when the results are no longer needed."""

    def __init__(self, processes: int) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[Any], Any], Any] | None] = SimpleQueue()
        self._lock = Lock()  # guards the two below
        self._workers: list[_Worker] = []
        self._closed = False
        with _sigint_blocked():
            for _ in range(processes):
                self._workers.append(_Worker())
        # Daemon threads and processes: an exit that skips close() must not wait for them.
        for place in range(processes):
            Thread(target=self._feed, args=(place,), daemon=True).start()

    def submit(self, function: Callable[[Any], Any], job: Any) -> Future[Any]:
        """Return a future of ``function(job)``; it fails with the error raised there, or with JobKilledWorkersError."""
        future: Future[Any] = Future()
        self._tasks.put((future, function, job))
        return future

    def close(self) -> None:
        """End all workers, including those in the middle of a job."""
        with self._lock:
            self._closed = True
        for _ in self._workers:
            self._tasks.put(None)
        for worker in self._workers:
            worker.process.terminate()
        until = time.monotonic() + _GRACE
        for worker in self._workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()

    def _feed(self, place: int) -> None:
        while (task := self._tasks.get()) is not None and not self._closed:
            future, function, job = task
            try:
                future.set_result(self._do(place, function, job))
            except Exception as error:
                future.set_exception(error)

    def _do(self, place: int, function: Callable[[Any], Any], job: Any) -> Any:
        for _ in range(_ATTEMPTS):
            worker = self._workers[place]
            try:
                return worker.do(function, job)
            except _WorkerDiedError:
                worker.process.join()
                with self._lock:
                    if self._closed:
                        raise
                    self._workers[place] = _Worker()
        raise JobKilledWorkersError(f"{_ATTEMPTS} workers died one after the other on it ({_how(worker.process.exitcode)})")


class _WorkerDiedError(Exception):
    """The process at the other end of the pipe is gone."""


class _Worker:
    """A worker process and the pipe to it."""

    def __init__(self) -> None:
        self.pipe, theirs = _context.Pipe()
        self.process = _context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def do(self, function: Callable[[Any], Any], job: Any) -> Any:
        request = pickle.dumps((function, job))
        try:
            self.pipe.send_bytes(request)
            answer = self.pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise _WorkerDiedError from error
        result, failure = pickle.loads(answer)
        if failure is not None:
            raise failure
        return result


def _serve(pipe: Connection) -> None:
    """Answer requests in a worker process until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; only the parent acts on it
    signal.signal(signal.SIGTERM, _leave)
    parent = parent_process()
    assert parent is not None
    end_with_parent(parent.join, _leave_late)
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(_answer(request))


def _answer(request: bytes) -> bytes:
    try:
        function, job = pickle.loads(request)
        return pickle.dumps((function(job), None))
    except Exception as error:
        error.add_note(f"In the worker process:\n{traceback.format_exc()}")
        try:
            answer = pickle.dumps((None, error))
            pickle.loads(answer)  # errors with their own constructor often fail only here
            return answer
        except Exception:
            return pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")))


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)  # raised, so that unfinished files are removed on the way out


def _leave_late() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Start workers with Ctrl-C blocked until they ignore it; else one that comes now prints a traceback for each."""
    resource_tracker.ensure_running()  # otherwise the first worker starts it, and that unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _how(exitcode: int | None) -> str:
    assert exitcode is not None, "it was waited for"
    why = ", as the system does when memory runs out" if exitcode == -signal.SIGKILL else ""
    return f"the last one {how_it_ended(exitcode)}{why}"
