"""Define `megamoe data dedup`: its arguments, options and printed output."""

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
    help="Exact compares the bytes of the pictures, near their perceptual hashes.",
)
@click.option(
    "--distance",
    type=click.IntRange(0, 16),
    metavar="D",
    help="With --near: maximum number of the 64 bits that may differ.  [default: 4; above 6 is slow on large sets]",
)
@click.option(
    "--of",
    type=click.Choice(["image", "image+caption"]),
    default="image",
    show_default=True,
    help="With --exact: what must be equal in two samples.",
)
@click.option("--against", metavar="EVAL_SHARDS", help="Also drop samples that are in this evaluation set.")
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
    """Write the samples of SHARDS to OUT without duplicate pictures.

    A sample is dropped if it is equal or near to an earlier sample that is kept, or to a sample of EVAL_SHARDS.
    OUT/dropped.jsonl names each dropped sample and the one that it duplicates.
    """
    from data_tools.verbs.dedup import dedup_shards
    from megamoe.commands.data.outcome import show_account
    from megamoe.core.errors import UserError

    if exact and distance is not None:
        raise UserError(f"--distance {distance}: only --near uses a distance; add --near or omit --distance")
    if not exact and of != "image":
        raise UserError(f"--of {of}: --near compares pictures only; use --exact or omit --of")
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
