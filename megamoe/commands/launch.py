"""`megamoe launch slurm | status | logs | stop | resume`, and the two verbs that run inside the job."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from launcher.slurm.submission import Submission

PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)

# Each is the setting of the same name in launch or launch.slurm.
_OPTIONS = (
    click.option("--nodes", type=COUNT, help="Nodes at work, when there are as many.  [default: 1]"),
    click.option("--min-nodes", type=COUNT, help="Go on with as few.  [default: as few as a layout fits]"),
    click.option("--spares", type=click.IntRange(min=0), help="Nodes that stand by.  [default: 0]"),
    click.option("--gpus-per-node", type=click.IntRange(min=0), help="GPUs, one rank each.  [default: 0, on the CPU]"),
    click.option("--ranks-per-node", type=COUNT, help="Ranks.  [default: one per GPU, or one]"),
    click.option("--partition", help="Partition.  [default: the site's]"),
    click.option("--account", help="Account to charge."),
    click.option("--time", metavar="D-HH:MM:SS", help="Time limit of one job; the next job resumes the run."),
    click.option("--qos", help="Quality of service."),
    click.option("--constraint", help="Features that nodes must have."),
    click.option("--exclude", metavar="NODES", help="Nodes never to use."),
    click.option("--reservation", help="Reservation."),
    click.option("--container", metavar="IMAGE", help="Image to run in, for sites with pyxis."),
)
dry_run = click.option("--dry-run", is_flag=True, help="Print the batch script; submit and write nothing.")


def slurm_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a job."""
    for option in reversed(_OPTIONS):
        verb = option(verb)
    return verb


@click.group()
def launch() -> None:
    """Run on many nodes: submit to SLURM, follow, stop, resume."""


@launch.command(short_help="Submit a training to SLURM.")
@click.argument("config", type=PATH)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@slurm_options
@click.option(
    "--resume",
    default="none",
    show_default=True,
    metavar="auto|none|PATH",
    help="What the first job resumes from, as in `megamoe train`; later jobs resume from the newest checkpoint.",
)
@dry_run
def slurm(config: Path, overrides: tuple[str, ...], resume: str, dry_run: bool, **options: object) -> None:
    """Train as CONFIG says in a job of SLURM, which survives the loss of nodes, preemption and time limits.

    Each option is the setting of its name in launch or launch.slurm, and wins over KEY=VALUE.
    """
    from launcher.slurm.submission import new_run, options_as_settings

    _submit(new_run(config, [*overrides, *options_as_settings(options)], resume), dry_run)


@launch.command(short_help="Submit a run again, from its newest checkpoint.")
@click.argument("run", type=PATH)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@slurm_options
@dry_run
def resume(run: Path, overrides: tuple[str, ...], dry_run: bool, **options: object) -> None:
    """Submit RUN again with the settings it was launched with, changed by options and KEY=VALUE."""
    from launcher.slurm.submission import options_as_settings, resumed_run

    _submit(resumed_run(run, [*overrides, *options_as_settings(options)]), dry_run)


@launch.command(short_help="Show a run's job, nodes and what has happened to it.")
@click.argument("run", type=PATH)
@click.option("--events", type=click.IntRange(min=0), default=15, show_default=True, help="Show the last N events.")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def status(run: Path, events: int, as_json: bool) -> None:
    """Show the job of RUN, its nodes, how far it is, and each fault with what was done about it."""
    from launcher.slurm.run_status import as_text, read_status

    found = read_status(run)
    click.echo(json.dumps(found, indent=1) if as_json else as_text(found, events))


@launch.command(short_help="Show what a run's job or one of its ranks says.")
@click.argument("run", type=PATH)
@click.option("--rank", type=click.IntRange(min=0), help="Of this rank, in the newest attempt.  [default: the job's log]")
@click.option("--lines", type=click.IntRange(min=0), default=50, show_default=True, help="The last N lines.")
@click.option("--follow", is_flag=True, help="Wait for more, also of later jobs and attempts, until Ctrl-C.")
def logs(run: Path, rank: int | None, lines: int, follow: bool) -> None:
    """Show the end of the job's log, or of a rank's."""
    from launcher.slurm.follow_log import newest_log, show_log

    def log() -> Path | None:
        return newest_log(run, rank)

    show_log(log, lines, follow, sys.stdout.buffer)


@launch.command(short_help="Let a run save, and end its job.")
@click.argument("run", type=PATH)
@click.option("--now", is_flag=True, help="Do not wait for a save.")
def stop(run: Path, now: bool) -> None:
    """End the job of RUN after its ranks have saved; it is not started again, until `megamoe launch resume`."""
    from launcher.slurm.submission import hint, stop_jobs

    stopped = stop_jobs(run.absolute(), now)
    if not stopped:
        click.echo(f"{run}: no job of this run is in the queue")
    for job, how in stopped.items():
        click.echo(f"job {job}: {how}")
    if stopped:
        click.echo(f"go on with it later by {hint('resume', run.absolute())}")


@launch.command(hidden=True)
@click.argument("run", type=PATH)
@click.pass_context
def supervise(ctx: click.Context, run: Path) -> None:
    """Inside the job, in its batch script: keep RUN going."""
    _hold_warnings()
    from launcher.slurm.inside_job import supervise_run

    ctx.exit(supervise_run(run))


@launch.command(hidden=True)
@click.argument("run", type=PATH)
@click.pass_context
def agent(ctx: click.Context, run: Path) -> None:
    """Inside the job, on each node: start the ranks of this node as the supervisor of RUN says."""
    _hold_warnings()
    from launcher.slurm.inside_job import serve_run

    # The name by which SLURM knows the node, since it is SLURM that is told to leave it out.
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    ctx.exit(serve_run(run, node))


def _hold_warnings() -> None:
    """Keep SIGUSR1 until ``caught_signals`` listens, a second or two of imports later, not die of it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def _submit(submission: Submission, dry_run: bool) -> None:
    import shutil

    from launcher.slurm.submission import hint

    if not dry_run:
        submission.check()
        job = submission.submit()
        click.echo(f"submitted job {job}; the run is in {submission.run_dir}")
        for what, verb in (("how it goes", "status"), ("what it says", "logs --follow"), ("save and end", "stop")):
            click.echo(f"  {what:<13} {hint(verb, submission.run_dir)[1:-1]}")
        return
    if shutil.which("sbatch") is None:
        click.echo("no sbatch here: partition, account, number of nodes and time were not checked", err=True)
    else:
        submission.check()
    click.echo(submission.script, nl=False)
