"""`megamoe report`."""

from __future__ import annotations

from pathlib import Path

import click

PATH = click.Path(path_type=Path)


@click.command(short_help="Write the run as one HTML page.")
@click.argument("run", type=PATH)
def report(run: Path) -> None:
    """Write the run as one HTML page: curves, expert load, pictures with captions."""
    from megamoe.report.run_page import write_report

    click.echo(write_report(run))
