"""`megamoe data dedup`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from megamoe.commands.data.options import FOLDER, as_json, cluster, dry_run, processes


@click.command()
@click.argument("shards")
@click.argument("out", type=FOLDER)
@click.option(
    "--exact/--near",
    default=True,
    show_default=True,
    help="Exact: the pictures' bytes are equal. Near: their perceptual hashes differ in few bits.",
)
@click.option(
    "--distance",
    type=click.IntRange(0, 16),
    metavar="D",
    help="With --near: most bits of 64 in which two hashes may differ.  [default: 4; above 6 slow on large sets]",
)
@click.option(
    "--of",
    type=click.Choice(["image", "image+caption"]),
    default="image",
    show_default=True,
    help="With --exact: what has to be equal.",
)
@click.option("--against", metavar="EVAL_SHARDS", help="Drop as well what an evaluation set shows.")
@processes
@cluster
@dry_run
@as_json
@click.pass_context
def dedup(
    ctx: click.Context,
    shards: str,
    out: Path,
    exact: bool,
    distance: int | None,
    of: Literal["image", "image+caption"],
    against: str | None,
    processes: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the samples of SHARDS to OUT, each picture once: the first in the order of the shards stays.

    A sample is dropped if it is equal or near to one before it that stays, or to one of EVAL_SHARDS. OUT/dropped.jsonl
    names each with its partner.
    """
    from data_tools.verbs.dedup import dedup_shards
    from megamoe.commands.data.outcome import show_account
    from megamoe.core.errors import UserError

    if exact and distance is not None:
        raise UserError(f"--distance {distance}: only --near has one; add --near or leave it out")
    if not exact and of != "image":
        raise UserError(f"--of {of}: --near compares pictures only; use --exact or leave it out")
    account = dedup_shards(
        shards,
        out,
        by=of if exact else "near",
        distance=4 if distance is None else distance,
        against=against,
        processes=processes,
        dry_run=dry_run,
    )
    show_account(ctx, "dedup", out, account, as_json=as_json, dry_run=dry_run)
