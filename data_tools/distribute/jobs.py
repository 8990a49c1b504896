"""Run one function over many shards, in processes on this machine or on many machines."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from contextvars import ContextVar
from typing import TypeVar

from tqdm import tqdm

from data_tools.distribute.process_pool import JobKilledWorkersError, WorkerPool
from megamoe.core.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
_cluster: ContextVar[str | None] = ContextVar("cluster", default=None)
_AHEAD = 4  # jobs in flight per process, so that a slow one does not idle the others at once


@contextmanager
def on_cluster(cluster: str | None) -> Iterator[None]:
    """Make ``cluster`` the default of :func:`map_jobs` while the body runs."""
    token = _cluster.set(cluster)
    try:
        yield
    finally:
        _cluster.reset(token)


def cluster_in_use() -> str | None:
    """Return the cluster that :func:`on_cluster` set, if any."""
    return _cluster.get()


def map_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    label: str,
    unit: str = "shard",
    processes: int | None = None,
    cluster: str | None = None,
    at_most: int | None = None,
) -> Iterator[tuple[Job, Result]]:
    """Yield ``(job, function(job))`` in the order of ``jobs``, with progress and ETA on stderr.

    ``function`` and its jobs are sent to other processes, so they must be importable and picklable. A long list costs
    no memory: only a few jobs per process are in flight. When a worker dies, its job runs again, so jobs must be
    idempotent.

    Args:
        function: work to do for one job. An error in it ends the whole map and is raised here, with a note that names the
            job.
        jobs: the jobs.
        label: name of the work on the progress bar.
        unit: what a job is, for the progress bar and for errors.
        processes: processes on this machine; default one per core that this process may use. With 1, no process is
            started. With ``cluster="slurm"``: worker processes in the cluster, which has no default.
        cluster: ``tcp://HOST:PORT`` (or ``tls://``) of a running Dask scheduler, or ``slurm`` to start workers as SLURM
            jobs. Default: the cluster of :func:`on_cluster`, else this machine.
        at_most: maximum number of jobs that run at a time anywhere; default the number of processes.

    Raises:
        UserError: the cluster cannot be used, or a job kills every worker that takes it.
    """
    results = _results(function, jobs, processes, cluster or cluster_in_use(), at_most)
    with closing(results), tqdm(total=len(jobs), desc=label, unit=unit, file=sys.stderr, disable=None) as bar:
        for job in jobs:
            try:
                result = next(results)
            except JobKilledWorkersError as error:
                raise UserError(
                    f"{unit} {_name(job)}: {error}; give it more memory (fewer --processes) or omit it"
                ) from error
            except Exception as error:
                error.add_note(f"This was {label}, {unit} {_name(job)}")
                raise
            yield job, result
            bar.update()


def _results(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    processes: int | None,
    cluster: str | None,
    at_most: int | None,
) -> Generator[Result, None, None]:
    if cluster is not None and jobs:
        from data_tools.distribute.dask_cluster import map_on_cluster

        return map_on_cluster(function, jobs, cluster, processes, at_most)
    count = min(processes or len(os.sched_getaffinity(0)), at_most or len(jobs), len(jobs))
    return (function(job) for job in jobs) if count <= 1 else _map_in_pool(function, jobs, count)


def _map_in_pool(function: Callable[[Job], Result], jobs: Sequence[Job], count: int) -> Generator[Result, None, None]:
    with closing(WorkerPool(count)) as pool:
        under_way: deque[Future[Result]] = deque()
        for job in jobs:
            under_way.append(pool.submit(function, job))
            if len(under_way) >= _AHEAD * count:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def _name(job: object) -> str:
    """Name a job in one short line: itself if it is a name, else the first path or name in it."""
    parts = job if isinstance(job, tuple) else (job,)
    name = next((str(part) for part in parts if isinstance(part, str | os.PathLike)), repr(job))
    return name if len(name) <= 300 else f"{name[:300]}..."
