"""Submit a run to SLURM: check it, write RUN/launch, call sbatch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from launcher.elastic.layouts import ranks_per_node, team_sizes
from launcher.slurm.batch_script import job_options, job_script
from launcher.slurm.checks import check_cluster, check_settings
from launcher.slurm.request import Request, excluded_nodes, forget_job, note_job, noted_jobs
from launcher.slurm.tools import outside_job, slurm
from megamoe.config import Config, load_config
from megamoe.core.errors import UserError
from megamoe.core.files import atomic_file
from megamoe.core.run_folder import RunFolder
from megamoe.parallel.layout import plan_layout


@dataclass(frozen=True)
class Submission:
    """A run that could be submitted as far as is known without asking SLURM.

    Attributes:
        run_dir: absolute folder of the run.
        request: what the job is to do.
        settings: the resolved config.
        options: of sbatch.
        script: for sbatch.
    """

    run_dir: Path
    request: Request
    settings: Config
    options: tuple[str, ...]
    script: str

    def check(self) -> None:
        """Ask SLURM whether it would take the job.

        Raises:
            UserError: it would not, or a job of this run is queued.
        """
        check_cluster(self.settings.launch, self.script, self.options)
        if living := living_jobs(self.run_dir):
            raise UserError(
                f"run.dir {self.run_dir}: job {', '.join(living)} of this run is in the queue; follow it by "
                f"{hint('status', self.run_dir)}, or end it by {hint('stop', self.run_dir)}"
            )

    def submit(self) -> str:
        """Write RUN/launch, submit the job and return its id.

        Raises:
            UserError: the folder cannot be written, or SLURM refuses.
        """
        run = RunFolder(self.run_dir)
        try:
            run.logs.mkdir(parents=True, exist_ok=True)  # SLURM does not make it for its log
        except OSError as error:
            raise UserError(
                f"run.dir {self.run_dir}: cannot be written ({error.strerror}); choose another run.dir"
            ) from error
        # A config that is edited while the job waits or runs must not change what its next start does.
        _write(run.launch.config, self.request.config.read_text(encoding="utf-8"))
        replace(self.request, config=run.launch.config).write(self.run_dir)
        _write(run.launch.job_script, self.script)
        for job in noted_jobs(self.run_dir):
            forget_job(self.run_dir, job)
        answer = slurm(["sbatch", "--parsable", str(run.launch.job_script)], environment=outside_job(self.options))
        job = answer.strip().split(";")[0]
        note_job(self.run_dir, job, "run")
        return job


def new_run(config: Path, overrides: Sequence[str], resume: str) -> Submission:
    """Prepare a new run as CONFIG says; unless it is resumed, its folder must not hold a run.

    Raises:
        UserError: the request is wrong.
    """
    request = Request(config.absolute(), tuple(overrides), resume, Path.cwd())
    submission = _prepare(request)
    if resume == "none":
        metrics = RunFolder(submission.run_dir).metrics
        if metrics.exists() and metrics.stat().st_size > 0:
            raise UserError(
                f"run.dir {submission.run_dir}: holds a run already; go on with it by "
                f"{hint('resume', submission.run_dir)}, or choose another run.name"
            )
    elif resume != "auto" and not Path(resume).exists():
        raise UserError(f"--resume {resume}: no such checkpoint; give its folder, or auto for the newest one")
    return submission


def resumed_run(run_dir: Path, overrides: Sequence[str]) -> Submission:
    """Prepare to resume a launched run from its newest checkpoint, with further settings on top of those it had.

    Raises:
        UserError: the request is wrong.
    """
    before = Request.read(run_dir.absolute())
    settings = _last_of_each([*before.overrides, *overrides])
    submission = _prepare(replace(before, overrides=settings, resume="auto"))
    if submission.run_dir != run_dir.absolute():
        raise UserError(
            f"{run_dir}: with these settings the run's folder would be {submission.run_dir}; leave run.name and run.dir as "
            "they are, or launch a new run"
        )
    return submission


def living_jobs(run_dir: Path) -> dict[str, dict[str, str]]:
    """Return the run's jobs in the queue: id -> kind (run, next, helper), state, nodes, elapsed, limit, reason.

    Raises:
        UserError: SLURM does not answer.
    """
    noted = noted_jobs(run_dir)
    if not noted:
        return {}
    rows = slurm(["squeue", "--noheader", "--me", "--format=%i|%T|%N|%M|%l|%r|%j"]).splitlines()
    found = {}
    for job, state, nodes, elapsed, limit, reason, name in (row.split("|", 6) for row in rows):
        if job in noted and name.startswith("megamoe-"):  # ids begin anew when a site sets up its SLURM again
            found[job] = dict(kind=noted[job], state=state, nodes=nodes, elapsed=elapsed, limit=limit, reason=reason)
    return found


def stop_jobs(run_dir: Path, now: bool) -> dict[str, str]:
    """End the run's jobs and keep others from taking their place; return id -> what was done.

    A running job is told to save: its supervisor, which is its batch script, gets SIGTERM. A plain ``scancel`` would
    send SIGTERM to all and, at most sites, SIGKILL 30 s later. ``now`` is that.

    Raises:
        UserError: nothing was launched there, or SLURM does not answer.
    """
    Request.read(run_dir)
    living = living_jobs(run_dir)
    done = {}
    # Jobs that wait for another one come first: they start as soon as that one ends, cancelled or not.
    for job, found in sorted(living.items(), key=lambda item: item[1]["kind"] == "run"):
        if found["kind"] == "run" and found["state"] == "RUNNING" and not now:
            slurm(["scancel", "--batch", "--signal=TERM", job])
            done[job] = f"asked to save and end; follow it by {hint('status', run_dir)}"
        elif found["kind"] == "helper" and found["state"] == "RUNNING" and not now:
            done[job] = "helps the run's job, and ends with it"
        else:
            slurm(["scancel", job])
            done[job] = "cancelled"
    return done


def options_as_settings(options: Mapping[str, object]) -> list[str]:
    """Convert the command's options to ``KEY=VALUE`` settings of launch and launch.slurm; those not given are skipped."""
    settings = []
    for name, value in options.items():
        if value is None:
            continue
        key = (
            f"launch.{name}"
            if name in ("nodes", "min_nodes", "spares", "gpus_per_node", "ranks_per_node")
            else f"launch.slurm.{name}"
        )
        text = str(value)
        if isinstance(value, str) and yaml.safe_load(text) != text:
            text = yaml.safe_dump(text, default_style='"').strip()  # an account 007 stays what it is
        settings.append(f"{key}={text}")
    return settings


def hint(verb: str, run_dir: Path) -> str:
    """Return the ``megamoe launch`` command to type."""
    return f"`megamoe launch {verb} {shlex.quote(_short(run_dir))}`"


def _prepare(request: Request) -> Submission:
    settings = load_config(request.config, request.overrides)
    check_settings(settings.launch)
    _check_layouts(settings)
    run_dir = request.workdir / settings.run.folder
    groups = job_options(settings.launch, settings.run.name, run_dir, request.workdir, excluded_nodes(run_dir))
    script = job_script(groups, settings.launch.slurm, settings.run.name, run_dir)
    return Submission(run_dir, request, settings, tuple(each for _, group in groups for each in group), script)


def _check_layouts(settings: Config) -> None:
    launch, ranks = settings.launch, ranks_per_node(settings.launch)
    # At full size the config's own layout has to fit; other layouts serve what is left after a loss.
    plan_layout(settings, launch.nodes * ranks)
    sizes = team_sizes(settings)
    if launch.min_nodes is not None and launch.min_nodes not in sizes:
        each = f"{ranks} rank{'s' * (ranks > 1)} each"
        raise UserError(
            f"launch.min_nodes {launch.min_nodes}: no layout fits {launch.min_nodes} nodes with {each}; use a number of "
            f"nodes that the run can work on: {', '.join(map(str, sizes))}"
        )


def _last_of_each(settings: Sequence[str]) -> tuple[str, ...]:
    """Drop settings that a later one of the same key replaces, so that a run resumed often keeps a short list."""
    last = {setting.partition("=")[0]: place for place, setting in enumerate(settings)}
    return tuple(setting for place, setting in enumerate(settings) if last[setting.partition("=")[0]] == place)


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
