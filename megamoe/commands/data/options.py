"""Define the options that several verbs share, so that they have the same name and meaning everywhere."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
Command = TypeVar("Command", bound=Callable[..., Any])

processes = click.option(
    "--processes",
    type=click.IntRange(min=1),
    help="Number of processes on this machine, or with --cluster slurm on all machines.  [default: one per core]",
)
dry_run = click.option("--dry-run", is_flag=True, help="Report what would be done without writing anything.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")


def cluster(command: Command) -> Command:
    """Add ``--cluster``, which selects where ``map_jobs`` runs, and ``--cluster-config``, its settings."""

    @functools.wraps(command)
    def there(*arguments: Any, cluster: str | None, **options: Any) -> Any:
        from data_tools.distribute.jobs import on_cluster

        with on_cluster(cluster):
            return command(*arguments, **options)

    decorated: Any = there
    for option in (
        click.option(
            "--cluster-config",
            type=click.Path(exists=True, dir_okay=False, readable=True),
            metavar="FILE",
            expose_value=False,
            callback=_use_config,
            help="YAML file with the settings of --cluster slurm: jobqueue: slurm: {cores, memory, queue, account, "
            "walltime, interface, ...}, as in ~/.config/dask/jobqueue.yaml.",
        ),
        click.option(
            "--cluster",
            metavar="ADDRESS|slurm",
            is_eager=True,  # before --cluster-config, which asks for it
            help="Use many machines: tcp://HOST:PORT of a running Dask scheduler, or slurm, which starts workers as SLURM "
            "jobs and ends them with the command. All machines must share the folders.",
        ),
    ):
        decorated = option(decorated)
    return cast(Command, decorated)


def show(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print ``result`` as JSON, or ``text`` for people."""
    click.echo(json.dumps(result) if as_json else text)


def _use_config(context: click.Context, parameter: click.Parameter, path: str | None) -> None:
    if path is not None:
        if context.params.get("cluster") != "slurm":
            raise click.UsageError(
                "--cluster-config: only --cluster slurm has settings; add --cluster slurm or omit the file"
            )
        from data_tools.distribute.slurm_workers import use_config

        use_config(Path(path))
