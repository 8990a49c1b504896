"""`megamoe train`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from megamoe.core.environment import is_rank
from megamoe.core.errors import UserError

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("config", type=PATH)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--nproc", type=click.IntRange(min=1), help="Processes on this machine, one rank each.  [default: 1]")
@click.option(
    "--resume",
    default="none",
    show_default=True,
    metavar="auto|none|PATH",
    help="auto: the run's newest good checkpoint, or the beginning when it has none; none: a new run, in a folder without "
    "one; PATH: a certain checkpoint.",
)
@click.pass_context
def train(ctx: click.Context, config: Path, overrides: tuple[str, ...], nproc: int | None, resume: str) -> None:
    """Train as CONFIG says, with settings changed by KEY=VALUE.

    Start and supervise local processes; when one dies, restart all from the last checkpoint. When started by torchrun, by
    srun with a task per rank or by mpirun, be one of these ranks.
    """
    from launcher.workers.environment import rank_environment
    from megamoe.config import load_config

    os.environ.update(rank_environment(os.environ))
    settings = load_config(config, overrides)
    if is_rank():
        if nproc is not None and nproc != int(os.environ["WORLD_SIZE"]):
            raise UserError(f"--nproc {nproc}: this is one of WORLD_SIZE={os.environ['WORLD_SIZE']} ranks; leave it out")
        from megamoe.train.rank import train as train_rank

        ctx.exit(train_rank(settings, resume))

    from launcher.local.launch import launch_local
    from megamoe.metrics.metrics_file import refuse_existing
    from megamoe.parallel.layout import plan_layout

    # Whatever can be known to be wrong is said here, once, before any process starts.
    plan_layout(settings, world_size=nproc or 1)
    if resume == "none":
        refuse_existing(settings.run.folder)
    elif resume != "auto" and not Path(resume).exists():
        raise UserError(f"--resume {resume}: no such checkpoint; give its folder, or auto for the newest one")
    patience = settings.train.watchdog_seconds
    ctx.exit(
        launch_local(config, overrides, nproc or 1, resume, settings.launch, settings.run.folder, watchdog_seconds=patience)
    )
