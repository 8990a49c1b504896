"""Options that several verbs share, so that they are called the same and mean the same everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)

processes = click.option(
    "--processes", type=click.IntRange(min=1), help="Processes on this machine.  [default: one per core]"
)
dry_run = click.option("--dry-run", is_flag=True, help="Say what would be done, and write nothing.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")


def show(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print ``result`` as JSON, or ``text`` for people."""
    click.echo(json.dumps(result) if as_json else text)
