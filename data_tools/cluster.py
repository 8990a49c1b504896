"""The same function over many machines: on the workers of a Dask scheduler, or on workers started as SLURM jobs.

Why Dask: docs/decisions/0007-cluster-engine.md.
"""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import yaml

from data_tools.pool import JobKilledWorkersError
from megamoe.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
_AHEAD = 4  # results kept per worker thread while an earlier job is not done
_LOOK = 1.0  # seconds between looks at which workers there are
_NO_WORKERS = 60.0  # seconds that a running scheduler may be without workers: one that restarts is back by then
_SETTINGS = "jobqueue.slurm"  # the section of Dask's configuration that dask-jobqueue reads


def map_on_cluster(
    function: Callable[[Job], Result], jobs: Sequence[Job], cluster: str, processes: int | None
) -> Generator[Result, None, None]:
    """Yield the results in the order of ``jobs``; see :func:`data_tools.jobs.map_jobs`.

    Raises:
        UserError: the cluster cannot be used.
        JobKilledWorkersError: every worker that took the next job died, more often than the scheduler allows.
    """
    from distributed import KilledWorker
    from distributed.client import FutureCancelledError

    with _connected(cluster, processes) as (client, workers):
        done: SimpleQueue[Any] = SimpleQueue()
        under_way: deque[Any] = deque()
        running = submitted = 0
        try:
            while submitted < len(jobs) or under_way:
                # as many as there are threads: a worker that dies is counted against the jobs that it ran, no others
                while submitted < len(jobs) and running < workers.threads and len(under_way) < _AHEAD * workers.threads:
                    future = client.submit(function, jobs[submitted], pure=False)
                    future.add_done_callback(done.put)
                    under_way.append(future)
                    running, submitted = running + 1, submitted + 1
                while under_way and under_way[0].done():
                    yield under_way.popleft().result()
                try:
                    done.get(timeout=_LOOK)
                    running -= 1
                except Empty:
                    workers.look()
        except KilledWorker as error:
            raise JobKilledWorkersError(
                f"{error.allowed_failures + 1} workers of {cluster} died one after the other doing it"
            ) from error
        except FutureCancelledError as error:
            raise UserError(f"--cluster {cluster}: the scheduler went away; start it and run the same again") from error


class _Workers:
    """How many threads work for us now, and whether it makes sense to wait for more."""

    def __init__(self, client: Any, cluster: str, failed: list[str]) -> None:
        self.threads = 0
        self._client, self._cluster, self._failed = client, cluster, failed
        self._seen = time.monotonic()
        self._said = False
        self.look()

    def look(self) -> None:
        """Count the threads.

        Raises:
            UserError: SLURM refused the workers, or there have been none for a minute.
        """
        if self._failed:
            raise UserError(f"--cluster slurm: the workers cannot be started: {self._failed[0]}")
        try:
            self.threads = sum(self._client.nthreads().values())
        except OSError as error:
            raise UserError(
                f"--cluster {self._cluster}: the scheduler went away; start it and run the same again"
            ) from error
        if self.threads:
            self._seen = time.monotonic()
        elif self._cluster == "slurm":  # a queue may be long
            if not self._said:
                print("waiting for SLURM to start the workers (see squeue)", file=sys.stderr)
            self._said = True
        elif time.monotonic() - self._seen > _NO_WORKERS:
            raise UserError(
                f"--cluster {self._cluster}: the scheduler has no workers; start some with `dask worker {self._cluster}`"
            )


@contextmanager
def _connected(cluster: str, processes: int | None) -> Iterator[tuple[Any, _Workers]]:
    try:
        import dask
        from distributed import Client
    except ImportError as error:
        raise _not_installed("distributed") from error

    if cluster == "slurm":
        with slurm_cluster(processes) as (workers, failed), Client(workers) as client:
            yield client, _Workers(client, cluster, failed)
        return
    if not cluster.startswith(("tcp://", "tls://")):
        raise UserError(f"--cluster {cluster}: no such cluster; give tcp://HOST:PORT of a running scheduler, or slurm")
    if processes is not None:
        raise UserError(f"--processes {processes}: {cluster} has the workers that it has; leave it out")
    try:
        with dask.config.set({"distributed.comm.timeouts.connect": "10s"}):
            client = Client(cluster, timeout=10, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--cluster {cluster}: no scheduler answers there; start one with `dask scheduler`, and check host and port"
        ) from error
    with client:
        yield client, _Workers(client, cluster, [])


@contextmanager
def slurm_cluster(processes: int | None) -> Iterator[tuple[Any, list[str]]]:
    """A scheduler in this process, and ``processes`` workers that SLURM jobs run; both end with the context.

    The settings are those of dask-jobqueue (``jobqueue.slurm`` in Dask's configuration). All connections are encrypted
    and authenticated by keys made for this run: other users of the cluster's network cannot send it work.

    Yields:
        The cluster, and a list that gets the reason when SLURM refuses a job.

    Raises:
        UserError: a package is missing or the settings cannot be used.
    """
    try:
        import dask
        from dask_jobqueue.slurm import SLURMCluster, SLURMJob
    except ImportError as error:
        raise _not_installed("dask-jobqueue") from error
    if processes is None:
        raise UserError("--cluster slurm: how many workers is not said; add --processes N (one core each)")
    failed: list[str] = []

    class Submitted(SLURMJob):
        async def _submit_job(self, script_filename: str) -> str:
            try:
                return await super()._submit_job(script_filename)
            except (OSError, RuntimeError) as error:  # no sbatch here, or it refused
                failed.append(" ".join(str(error).split()))
                raise

    settings = dask.config.get(_SETTINGS)
    cores = settings["cores"]
    try:
        workers = SLURMCluster(
            job_cls=Submitted,  # type: ignore[arg-type]  # its annotation names an instance
            # the tools are Python and hold its lock: a thread beside another one in a process does no work
            processes=settings["processes"] or cores,
            scheduler_options={"dashboard": False} | settings["scheduler-options"],
            security=True,
            shared_temp_directory=settings["shared-temp-directory"] or os.getcwd(),
            worker_extra_args=["--no-dashboard", *settings["worker-extra-args"]],
        )
    except ImportError as error:
        raise _not_installed("cryptography") from error
    except (ValueError, TypeError, OSError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"--cluster slurm: {_SETTINGS} in Dask's configuration cannot be used: {first_line}") from error
    with workers:
        workers.adapt(minimum=processes, maximum=processes)  # not scale(): it brings no job back that SLURM ended
        yield workers, failed


def use_config(path: Path) -> None:
    """Take settings for :func:`slurm_cluster` from a YAML file, over those of Dask's own configuration files.

    Raises:
        UserError: a package is missing, or the file is no such YAML or has a key that dask-jobqueue does not know.
    """
    try:
        import dask
        import dask_jobqueue
    except ImportError as error:
        raise _not_installed("dask-jobqueue") from error
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--cluster-config {path}: cannot be read as YAML ({error})") from error
    given = (content.get("jobqueue") or {}).get("slurm") if isinstance(content, dict) else None
    if not isinstance(given, dict):
        raise UserError(f"--cluster-config {path}: has no section jobqueue: slurm:, in which cores and memory are given")
    defaults = (Path(dask_jobqueue.__file__).parent / "jobqueue.yaml").read_text(encoding="utf-8")
    known = list(yaml.safe_load(defaults)["jobqueue"]["slurm"])
    for key in given:
        if str(key).replace("_", "-") not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.0)[0]
            raise UserError(
                f"--cluster-config {path}: jobqueue.slurm.{key} is no setting of dask-jobqueue; nearest: {near}"
            )
    dask.config.refresh(paths=[*dask.config.paths, str(path)])


def _not_installed(package: str) -> UserError:
    return UserError(
        f"--cluster needs the package {package}: pip install distributed dask-jobqueue cryptography (on all machines)"
    )
