"""Define `megamoe data split`: its arguments, options and printed output."""

from __future__ import annotations

from pathlib import Path

import click

from megamoe.commands.data.options import FOLDER, as_json, cluster, dry_run, processes


@click.command()
@click.argument("shards")
@click.argument("out", type=FOLDER)
@click.option(
    "--names", default="train,validation", show_default=True, help="Names of the parts; each becomes a folder in OUT."
)
@click.option("--shares", default="0.99,0.01", show_default=True, help="Shares of the parts; their sum is 1.")
@processes
@cluster
@dry_run
@as_json
@click.pass_context
def split(
    ctx: click.Context,
    shards: str,
    out: Path,
    names: str,
    shares: str,
    processes: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the samples of SHARDS to one folder per part in OUT.

    The part of a sample depends on its key alone, so a sample stays in its part when the set is resharded.
    """
    from data_tools.verbs.split import split_shards
    from megamoe.commands.data.outcome import show_account

    parts, sizes = ([each.strip() for each in value.split(",")] for value in (names, shares))
    account = split_shards(shards, out, parts, sizes, processes=processes, dry_run=dry_run)
    show_account(ctx, "split", out, account, as_json=as_json, dry_run=dry_run)
