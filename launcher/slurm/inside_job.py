"""Entry points inside a SLURM job: the supervisor in its batch script, and the agent on each of its nodes."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.elastic.events import History
from launcher.slurm.request import Request, first_start, forget_job, note_job, noted_jobs
from launcher.slurm.slurm_cluster import SlurmCluster, orphaned
from launcher.workers.output import Terminal
from launcher.workers.run_progress import run_state
from megamoe.config import load_config
from megamoe.core.errors import UserError
from megamoe.core.run_folder import RunFolder


def supervise_run(run_dir: Path) -> int:
    """Supervise the run that RUN/launch/request.json asks for, with the nodes of this job; return its exit status.

    Raises:
        UserError: this is no job of SLURM, or the request is wrong.
    """
    from launcher.elastic.run import supervise

    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise UserError("SLURM_JOB_ID is not set: this verb runs in the job that `megamoe launch slurm` submits")
    request = Request.read(run_dir)
    os.chdir(request.workdir)
    settings = load_config(request.config, request.overrides)
    resume = request.resume if first_start(run_dir) else _where_the_run_is(run_dir, request)
    for earlier in noted_jobs(run_dir, ["run"]):
        forget_job(run_dir, earlier)
    forget_job(run_dir, job)  # it waited as the next one of a chain
    note_job(run_dir, job, "run")
    cluster = SlurmCluster(settings.launch, settings.run.name, run_dir, job, Terminal().say)
    return supervise(request.config, request.overrides, resume, settings, cluster)


def serve_run(run_dir: Path, node: str) -> int:
    """Serve the supervisor of the run on ``node``; return the exit status."""
    from launcher.elastic.agent import run_agent
    from launcher.health.node import node_problems

    request = Request.read(run_dir)
    os.chdir(request.workdir)
    settings = load_config(request.config, request.overrides)

    def start_again(why: str) -> None:
        Terminal().say(f"{node}: {why}")
        History(run_dir).event("orphaned", node=node, why=why)
        orphaned(run_dir, settings.launch)

    def checks() -> list[str]:
        return list(map(str, node_problems(node, run_dir, settings.launch)))

    return run_agent(run_dir, node, os.environ.get("SLURM_JOB_ID", ""), checks=checks, orphaned=start_again)


def _where_the_run_is(run_dir: Path, request: Request) -> str:
    """Return what a later start of the job resumes from.

    The newest checkpoint is right unless the user asked to start from a certain one: then the folder may hold later steps
    of the history that was left behind, and only what was written since counts.
    """
    if request.resume in ("auto", "none"):
        return "auto"
    submitted = RunFolder(run_dir).launch.request.stat().st_mtime
    return str(run_state(run_dir, submitted).checkpoint or request.resume)
