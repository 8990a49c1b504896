"""The same function over many shards, in a pool of processes."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

from tqdm import tqdm

Job = TypeVar("Job")
Result = TypeVar("Result")
_AHEAD = 4  # jobs under way per process: a slow one does not leave the others idle at once


def map_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    label: str,
    unit: str = "shard",
    processes: int | None = None,
) -> Iterator[tuple[Job, Result]]:
    """Yield ``(job, function(job))`` in the order of ``jobs``, with progress and ETA on stderr.

    ``function`` and its jobs are sent to other processes, so they must be importable and picklable. A long list costs
    no memory: only a few jobs per process are under way.

    Args:
        function: what to do; an error in it ends the whole map and is raised here.
        jobs: what to do it to.
        label: what the progress bar says.
        unit: what a job is, for the progress bar.
        processes: processes on this machine; default one per core that this process may use. 1: no other process.
    """
    count = min(processes or len(os.sched_getaffinity(0)), len(jobs))
    with tqdm(total=len(jobs), desc=label, unit=unit, file=sys.stderr, disable=None) as bar:
        if count <= 1:
            for job in jobs:
                yield job, function(job)
                bar.update()
            return
        with _pool(count) as pool:
            under_way: deque[tuple[Job, Future[Result]]] = deque()
            for job in jobs:
                under_way.append((job, pool.submit(function, job)))
                if len(under_way) >= _AHEAD * count:
                    first, future = under_way.popleft()
                    yield first, future.result()
                    bar.update()
            while under_way:
                first, future = under_way.popleft()
                yield first, future.result()
                bar.update()


@contextmanager
def _pool(processes: int) -> Iterator[Executor]:
    # "forkserver": a fork of this process could inherit a lock that another thread holds
    pool = ProcessPoolExecutor(processes, mp_context=get_context("forkserver"))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise RuntimeError("a worker process died; if it was killed for memory, use fewer with --processes") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
