"""Worker processes on this machine.

A worker that is killed takes only its job with it, and the job is done again. All of them end with the process that
started them, however that one ends. ``ProcessPoolExecutor`` does neither: one death breaks the whole pool without
telling which job it was, and workers outlive a parent that was killed.
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

_ATTEMPTS = 3  # a worker can be killed for another one's memory once or twice; three in a row are the job's own
_GRACE = 3.0  # seconds for a job to remove its unfinished file before its worker is killed
_context = get_context("forkserver")  # a fork of this process could inherit a lock that another thread holds


class JobKilledWorkersError(Exception):
    """A job ended several workers, one after the other; the message says how many and how."""


class WorkerPool:
    """As many jobs at a time as there are ``processes``; close it when the results are no longer wanted."""

    def __init__(self, processes: int) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[Any], Any], Any] | None] = SimpleQueue()
        self._lock = Lock()  # of the two below
        self._workers: list[_Worker] = []
        self._closed = False
        with _sigint_blocked():
            for _ in range(processes):
                self._workers.append(_Worker())
        # daemon threads and daemon processes: an exit that skips close() must not wait for them
        for place in range(processes):
            Thread(target=self._feed, args=(place,), daemon=True).start()

    def submit(self, function: Callable[[Any], Any], job: Any) -> Future[Any]:
        """The future ``function(job)``; its error is the one that was raised there, or JobKilledWorkersError."""
        future: Future[Any] = Future()
        self._tasks.put((future, function, job))
        return future

    def close(self) -> None:
        """End all workers, also those in the middle of a job."""
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
        raise JobKilledWorkersError(
            f"{_ATTEMPTS} workers died one after the other doing it ({_how(worker.process.exitcode)})"
        )


class _WorkerDiedError(Exception):
    """The process at the other end of the pipe is gone."""


class _Worker:
    """One process and the pipe to it."""

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
    """The life of a worker: jobs until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent decides
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
            pickle.loads(answer)  # errors with a constructor of their own often fail here only
            return answer
        except Exception:
            return pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")))


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)  # not an instant end: unfinished files are removed on the way out


def _leave_late() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Workers begin with Ctrl-C blocked, until they ignore it: else one that comes now prints a traceback for each."""
    resource_tracker.ensure_running()  # started by the first process otherwise, and it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _how(exitcode: int | None) -> str:
    assert exitcode is not None, "it was waited for"
    why = ", as the system does when memory runs out" if exitcode == -signal.SIGKILL else ""
    return f"the last one {how_it_ended(exitcode)}{why}"
