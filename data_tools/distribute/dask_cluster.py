"""Run one function over many jobs on many machines: workers of a Dask scheduler, or workers started as SLURM jobs.

Why Dask: docs/decisions/0007-cluster-engine.md.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from data_tools.distribute.process_pool import JobKilledWorkersError
from data_tools.distribute.slurm_workers import PACKAGES, SlurmWorkers, slurm_workers
from megamoe.core.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
_AHEAD = 4  # results kept per worker thread while an earlier job is unfinished
_LOOK = 1.0  # seconds between checks of the workers
_ANSWER = 10.0  # seconds for a running scheduler to answer
_NO_WORKERS = 60.0  # seconds that a scheduler may be without workers: a restarting worker is back by then


def map_on_cluster(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    cluster: str,
    processes: int | None,
    at_most: int | None = None,
) -> Generator[Result, None, None]:
    """Yield the results in the order of ``jobs``; see :func:`data_tools.distribute.jobs.map_jobs`.

    Raises:
        UserError: the cluster cannot be used.
        JobKilledWorkersError: every worker that took the next job died, more often than the scheduler allows.
    """
    try:
        from distributed import KilledWorker
        from distributed.client import FutureCancelledError
    except ImportError as error:
        raise UserError(f"--cluster needs the package {error.name}: {PACKAGES}") from error

    with _connected(cluster, processes) as (client, workers):
        done: SimpleQueue[Any] = SimpleQueue()
        folder = os.getcwd()
        under_way: deque[Any] = deque()
        running = submitted = 0
        try:
            while submitted < len(jobs) or under_way:
                # One job per thread: the death of a worker then counts only against the jobs it was running.
                threads = min(workers.threads, at_most or workers.threads)
                while submitted < len(jobs) and running < threads and len(under_way) < _AHEAD * threads:
                    # partial: Dask would search an argument for its own objects
                    future = client.submit(partial(_in_folder, folder, function, jobs[submitted]), pure=False)
                    future.add_done_callback(done.put)
                    under_way.append(future)
                    running, submitted = running + 1, submitted + 1
                if under_way and under_way[0].done():
                    try:
                        result = _result(under_way[0])
                    except _NotYetError:
                        pass
                    else:
                        under_way.popleft()
                        yield result
                        continue
                workers.look()
                with suppress(Empty):
                    done.get(timeout=_LOOK)
                    running -= 1
        except KilledWorker as error:
            raise JobKilledWorkersError(
                f"{error.allowed_failures + 1} workers of --cluster {cluster} died one after the other on it"
            ) from error
        except RuntimeError as error:
            if "deserialization of the task graph" not in str(error):
                raise
            raise UserError(
                f"--cluster {cluster}: {function.__module__} cannot be imported there; install the same version of this "
                "package for the scheduler and the workers"
            ) from error
        except FutureCancelledError as error:
            raise _gone(cluster) from error


class _NotYetError(Exception):
    """The worker that held the result has died, so the job runs again."""


def _result(future: Any) -> Any:
    """Return the result of a finished job. Its worker may have died with it, and Dask itself would wait without end."""
    try:
        return future.result(timeout=_NO_WORKERS)
    except TimeoutError:
        if future.status == "error":  # raised by the job
            raise
        raise _NotYetError from None


def _in_folder(folder: str, function: Callable[[Job], Result], job: Job) -> Result:
    """Run ``function(job)`` in the user's folder, so that relative paths mean the same."""
    if os.getcwd() != folder:
        try:
            os.chdir(folder)
        except OSError as error:
            raise UserError(
                f"--cluster: folder {folder} cannot be entered on {socket.gethostname()} ({error.strerror}); work in one "
                "that all machines share"
            ) from error
    return function(job)


class _Workers:
    """Count the threads that work now, and decide whether to wait for more."""

    def __init__(self, client: Any, cluster: str, slurm: SlurmWorkers | None = None) -> None:
        self.threads = 0
        self._client, self._cluster, self._slurm = client, cluster, slurm
        self._seen = time.monotonic()
        self._next_look = 0.0

    def look(self) -> None:
        """Count the threads, once a second.

        Raises:
            UserError: SLURM refused the workers, the scheduler is gone, or it has had no workers for a minute.
        """
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK
        try:
            workers = self._client.scheduler_info()["workers"].values()
        except OSError as error:
            raise _gone(self._cluster) from error
        self.threads = sum(worker["nthreads"] for worker in workers)
        if self._slurm is not None:
            self._slurm.look({worker["name"] for worker in workers})
        elif self.threads:
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > _NO_WORKERS:
            raise UserError(
                f"--cluster {self._cluster}: the scheduler has no workers; start some with `dask worker {self._cluster}`"
            )


@contextmanager
def _connected(cluster: str, processes: int | None) -> Iterator[tuple[Any, _Workers]]:
    from distributed import Client

    if cluster == "slurm":
        with slurm_workers(processes) as slurm, Client(slurm.cluster, set_as_default=False) as client:
            yield client, _Workers(client, cluster, slurm)
        return
    if not cluster.startswith(("tcp://", "tls://")):
        raise UserError(f"--cluster {cluster}: no such cluster; give tcp://HOST:PORT of a running scheduler, or slurm")
    if processes is not None:
        raise UserError(f"--processes {processes}: the scheduler {cluster} decides its own workers; omit --processes")
    try:
        client = Client(cluster, timeout=_ANSWER, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--cluster {cluster}: no scheduler answers there; start one with `dask scheduler`, and check host and port"
        ) from error
    with client:
        yield client, _Workers(client, cluster)


def _gone(cluster: str) -> UserError:
    return UserError(f"--cluster {cluster}: the scheduler is gone; start it and run the same command again")
