"""Define `megamoe data reshard`: its arguments, options and printed output."""

from __future__ import annotations

import re
from pathlib import Path

import click

from megamoe.commands.data.options import FOLDER, as_json, cluster, dry_run, processes

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)},
}
_LEAST = 20480  # the smallest tar with a sample in it


def _bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)", value.strip().upper())
    if match is None or match.group(2) not in _UNITS:
        raise click.BadParameter(f"{value!r}: give bytes, such as 500MB or 1GiB")
    size = int(float(match.group(1)) * _UNITS[match.group(2)])
    if size < _LEAST:
        raise click.BadParameter(f"{value!r}: the minimum is {_LEAST} bytes, a tar with one small sample")
    return size


@click.command()
@click.argument("shards")
@click.argument("out", type=FOLDER)
@click.option("--shard-size", type=click.IntRange(1), metavar="N", help="Samples per shard; the last shard may have fewer.")
@click.option("--shard-bytes", callback=_bytes, metavar="B", help="Maximum size of a shard, such as 500MB or 1GiB.")
@click.option("--shuffle", is_flag=True, help="Shuffle all samples across all shards.")
@click.option("--seed", type=click.IntRange(0), metavar="S", help="Seed of the shuffle.  [default: 0]")
@click.option(
    "--memory",
    type=click.FloatRange(0, min_open=True),
    default=4.0,
    show_default=True,
    metavar="GIB",
    help="Memory for samples in flight, all processes together. It does not change the result.",
)
@processes
@cluster
@dry_run
@as_json
@click.pass_context
def reshard(
    ctx: click.Context,
    shards: str,
    out: Path,
    shard_size: int | None,
    shard_bytes: int | None,
    shuffle: bool,
    seed: int | None,
    memory: float,
    processes: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the samples of SHARDS to OUT in shards of equal size, in the same order or shuffled.

    A key that repeats within a new shard becomes KEY-2, KEY-3, ...; the number of such samples is printed.
    """
    from data_tools.verbs.reshard import reshard_shards
    from megamoe.commands.data.outcome import show_account
    from megamoe.core.errors import UserError

    if (shard_size is None) == (shard_bytes is None):
        raise UserError("reshard: the size of the shards is not given; give either --shard-size or --shard-bytes")
    if seed is not None and not shuffle:
        raise UserError(f"--seed {seed}: nothing is random without --shuffle; add --shuffle or omit --seed")
    account = reshard_shards(
        shards,
        out,
        shard_size=shard_size,
        shard_bytes=shard_bytes,
        seed=(seed or 0) if shuffle else None,
        memory=int(memory * (1 << 30)),
        processes=processes,
        dry_run=dry_run,
    )
    show_account(ctx, "reshard", out, account, as_json=as_json, dry_run=dry_run)
