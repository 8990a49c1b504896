"""Print the outcome of the verbs that make shards from shards, and set their exit status."""

from __future__ import annotations

from pathlib import Path

import click

from data_tools.writing.account import Account
from megamoe.commands.data.options import show

_NAMED = 20  # lost samples named on the terminal; the result file names all


def show_account(ctx: click.Context, verb: str, out: Path, account: Account, *, as_json: bool, dry_run: bool) -> None:
    """Print ``account``, name the lost samples on stderr, and exit with status 1 if there are any."""
    for name, reason in account.lost[:_NAMED]:
        click.echo(f"lost {name}: {reason}", err=True)
    if (more := len(account.lost) - _NAMED) > 0:
        where = "--json names all" if dry_run else f"{out / verb}.json names all"
        click.echo(f"lost {more} more; {where}", err=True)
    result = {"verb": verb, "out": str(out), "dry_run": dry_run, **account.to_json()}
    show(result, as_json, f"{out}{' (dry run, nothing was written)' if dry_run else ''}: {account.text()}")
    if account.lost:
        ctx.exit(1)
