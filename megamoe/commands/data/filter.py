"""Define `megamoe data filter`: its arguments, options and printed output."""

from __future__ import annotations

import re
from pathlib import Path

import click

from megamoe.commands.data.options import FOLDER, as_json, cluster, dry_run, processes


def _codes(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    codes = tuple(code.strip() for code in value.split(",")) if value is not None else ()
    if not all(re.fullmatch("[a-z]{2,3}", code) for code in codes):
        raise click.BadParameter(f"{value!r}: give ISO 639 codes joined by commas, such as en,de")
    return codes


@click.command(name="filter")
@click.argument("shards")
@click.argument("out", type=FOLDER)
@click.option("--min-size", type=click.IntRange(1), metavar="PX", help="Minimum shorter side of the picture.")
@click.option("--max-size", type=click.IntRange(1), metavar="PX", help="Maximum longer side of the picture.")
@click.option(
    "--max-aspect", type=click.FloatRange(1), metavar="R", help="Maximum ratio of the longer side to the shorter."
)
@click.option("--min-caption-length", type=click.IntRange(1), metavar="CHARS", help="Minimum length of the caption.")
@click.option("--max-caption-length", type=click.IntRange(1), metavar="CHARS", help="Maximum length of the caption.")
@click.option("--language", callback=_codes, metavar="CODES", help="Languages that the caption may have, such as en,de.")
@click.option(
    "--where",
    multiple=True,
    metavar='"COLUMN OP NUMBER"',
    help='Condition on a number in the json, such as "similarity>=0.28" or "punsafe<0.5"; OP is one of >= <= == != > <. '
    "It may be given several times.",
)
@click.option(
    "--missing",
    type=click.Choice(["drop", "keep"]),
    default="drop",
    show_default=True,
    help="Drop or keep samples that lack a column of --where.",
)
@processes
@cluster
@dry_run
@as_json
@click.pass_context
def filter_(
    ctx: click.Context,
    shards: str,
    out: Path,
    min_size: int | None,
    max_size: int | None,
    max_aspect: float | None,
    min_caption_length: int | None,
    max_caption_length: int | None,
    language: tuple[str, ...],
    where: tuple[str, ...],
    missing: str,
    processes: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the samples of SHARDS that satisfy all conditions to OUT, and count the dropped ones by condition.

    Each shard of SHARDS becomes one shard of the same name in OUT.
    """
    from data_tools.checks.conditions import Conditions, parse_where
    from data_tools.verbs.filter import filter_shards
    from megamoe.commands.data.outcome import show_account

    conditions = Conditions(
        min_size=min_size,
        max_size=max_size,
        max_aspect=max_aspect,
        min_caption_length=min_caption_length,
        max_caption_length=max_caption_length,
        languages=language,
        where=tuple(parse_where(each) for each in where),
        keep_missing=missing == "keep",
    )
    account = filter_shards(shards, out, conditions, processes=processes, dry_run=dry_run)
    show_account(ctx, "filter", out, account, as_json=as_json, dry_run=dry_run)
