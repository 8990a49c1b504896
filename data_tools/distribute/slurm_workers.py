"""Start Dask workers as SLURM jobs, through dask-jobqueue."""

from __future__ import annotations

import difflib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from megamoe.core.errors import UserError

PACKAGES = "pip install distributed dask-jobqueue cryptography (on all machines)"
_SETTINGS = "jobqueue.slurm"  # the section of Dask's configuration that dask-jobqueue reads
_ASK_EVERY = 15.0  # seconds between calls of squeue; sites ask users not to call it more often


def use_config(path: Path) -> None:
    """Load settings for :func:`slurm_workers` from a YAML file; they override Dask's own configuration files.

    Raises:
        UserError: a package is missing, the file is not such YAML, or it has a key that dask-jobqueue does not know.
    """
    try:
        import dask

        with _interrupt_kept():
            import dask_jobqueue
    except ImportError as error:
        raise UserError(f"--cluster-config needs the package {error.name}: {PACKAGES}") from error
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--cluster-config {path}: cannot be read as YAML ({error})") from error
    section = content.get("jobqueue") if isinstance(content, dict) else None
    given = section.get("slurm") if isinstance(section, dict) else None
    if not isinstance(given, dict):
        raise UserError(f"--cluster-config {path}: has no section jobqueue: slurm:, which gives cores and memory")
    defaults = (Path(dask_jobqueue.__file__).parent / "jobqueue.yaml").read_text(encoding="utf-8")
    known = list(yaml.safe_load(defaults)["jobqueue"]["slurm"])
    for key in given:
        if str(key).replace("_", "-") not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.0)[0]
            raise UserError(f"--cluster-config {path}: {_SETTINGS}.{key} is no setting of dask-jobqueue; nearest: {near}")
    dask.config.refresh(paths=[*dask.config.paths, str(path)])


class SlurmWorkers:
    """Keep enough SLURM jobs of a ``dask_jobqueue.SLURMCluster`` running, also after SLURM ended some."""

    def __init__(self, cluster: Any, jobs: int, submitted: list[Any], refused: list[str]) -> None:
        self.cluster = cluster
        self._asked_for = jobs
        self._submitted, self._refused = submitted, refused
        self._connected: set[str] = set()  # names of jobs that have had a worker here
        self._over: set[str] = set()
        self._next_look = time.monotonic() + _ASK_EVERY
        self._said = False
        cluster.scale(jobs=jobs)

    def look(self, workers: set[str]) -> None:
        """Replace the jobs that have ended; ``workers`` are the names of the connected workers.

        Raises:
            UserError: SLURM refused a job, or one ended before its workers connected.
        """
        if self._refused:
            raise UserError(f"--cluster slurm: the workers cannot be started: {self._refused[0]}")
        if not workers and not self._said:
            print("waiting for SLURM to start the workers (see squeue)", file=sys.stderr)
            self._said = True
        self._connected |= {job.name for job in self._submitted if any(_is_of(name, job.name) for name in workers)}
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _ASK_EVERY
        if (alive := _queued()) is None:
            return
        for job in self._submitted:
            if job.name in self._over or job.job_id in alive:
                continue
            if job.name not in self._connected:
                raise UserError(
                    f"--cluster slurm: job {job.job_id} ended before its workers reached this machine; its output "
                    f"(slurm-{job.job_id}.out or in log-directory) says why; check the setting interface"
                )
            self._over.add(job.name)  # its walltime, a failed node, too much memory
            self._asked_for += 1
        self.cluster.scale(jobs=self._asked_for)


@contextmanager
def slurm_workers(processes: int | None) -> Iterator[SlurmWorkers]:
    """Run a scheduler in this process and at least ``processes`` workers in SLURM jobs; all end with the context.

    The settings are those of dask-jobqueue (``jobqueue.slurm`` in Dask's configuration). All connections are encrypted
    and authenticated by keys made for this run, so other users of the cluster's network cannot send it work.

    Raises:
        UserError: a package is missing or the settings cannot be used.
    """
    try:
        import cryptography  # noqa: F401 (dask makes the keys with it)
        import dask

        with _interrupt_kept():
            from dask_jobqueue.slurm import SLURMCluster, SLURMJob
        from distributed.core import Status
    except ImportError as error:
        raise UserError(f"--cluster slurm needs the package {error.name}: {PACKAGES}") from error
    if processes is None:
        raise UserError("--cluster slurm: the number of workers is not given; add --processes N (one core each)")
    submitted: list[Any] = []
    refused: list[str] = []

    class Submission(SLURMJob):
        async def start(self) -> None:
            try:
                await super().start()
                submitted.append(self)
            except (OSError, RuntimeError, ValueError) as error:  # no sbatch here, or it refused
                refused.append(" ".join(str(error).split()))
                self.status = Status.running  # as if started; otherwise the cluster fails to close

        async def close(self) -> None:
            await super().close()
            self.status = Status.closed  # dask-jobqueue does not set it, and the cluster reads it while it knows the job

    settings = dask.config.get(_SETTINGS)
    # The tools are Python and hold its global lock, so a second thread in a process would do no work.
    per_job = settings["processes"] or settings["cores"] or 1
    # SLURM decides when a job is over. A lost connection does not: a requeued job keeps its id.
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "10000h"}):
        try:
            cluster = SLURMCluster(
                job_cls=Submission,  # type: ignore[arg-type]  # its annotation names an instance
                processes=per_job,
                # The dashboard has no password, so it must not be reachable from other machines.
                scheduler_options={"dashboard": False, "dashboard_address": "127.0.0.1:0"} | settings["scheduler-options"],
                security=True,
                shared_temp_directory=settings["shared-temp-directory"] or os.getcwd(),
                worker_extra_args=["--no-dashboard", *settings["worker-extra-args"]],
            )
        except (ValueError, TypeError, OSError) as error:
            first_line = str(error).splitlines()[0]
            raise UserError(f"--cluster slurm: {_SETTINGS} in Dask's configuration cannot be used: {first_line}") from error
        with _without_keys(cluster), cluster:
            yield SlurmWorkers(cluster, math.ceil(processes / per_job), submitted, refused)


@contextmanager
def _interrupt_kept() -> Iterator[None]:
    """Keep Ctrl-C as it is: importing dask_jobqueue makes it end the process with status 0 (``runner.py`` in 0.9)."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _without_keys(cluster: Any) -> Iterator[None]:
    """Remove the files with the workers' keys. Left to garbage collection, they survive an error on the way out."""
    try:
        yield
    finally:
        for name in ("ca_file", "cert", "key"):
            getattr(cluster, f"_job_{name}").close()


def _is_of(worker: str, job: str) -> bool:
    return worker == job or worker.startswith(f"{job}-")


def _queued() -> set[str] | None:
    """Return the ids of this user's pending and running jobs; None if SLURM does not answer now."""
    command = ["squeue", "--noheader", "--format=%A", "--user", str(os.getuid())]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return set(answer.stdout.split()) if answer.returncode == 0 else None
