"""Define `megamoe data index`: its arguments, options and printed output."""

from __future__ import annotations

from pathlib import Path

import click

from megamoe.commands.data.options import FOLDER, as_json, cluster, dry_run, processes, show


@click.command()
@click.argument("shards")
@click.option("--out", type=FOLDER, help="Folder for the indexes.  [default: beside each shard]")
@click.option("--force", is_flag=True, help="Also read the shards whose index is current.")
@processes
@cluster
@dry_run
@as_json
def index(
    shards: str,
    out: Path | None,
    force: bool,
    processes: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the index of each tar of SHARDS: where its samples lie.

    Each tar is read once and checked for damage. Shards whose index is current are skipped, so after an interruption
    the same command does the rest.
    """
    import sys
    from dataclasses import asdict

    from tqdm import tqdm

    from data_tools.verbs.index import current_index, index_shards
    from megamoe.core.errors import DataError
    from megamoe.data.shards.expand import local_shards

    paths = local_shards([shards])
    if dry_run:
        skipped = 0 if force else sum(current_index(path, out) is not None for path in paths)
        where = "beside them" if out is None else f"in {out}"
        plan = {"shards": len(paths), "skipped": skipped, "dry_run": True}
        show(
            plan, as_json, f"{len(paths) - skipped} of {len(paths)} shards would be read and their indexes written {where}"
        )
        return
    totals = index_shards(
        paths,
        out,
        say=lambda line: tqdm.write(line, file=sys.stderr),
        force=force,
        processes=processes,
    )
    text = f"{totals.shards} shards, {totals.samples} samples"
    if totals.skipped:
        text += f" ({totals.skipped} shards skipped: their index is current)"
    if as_json or not totals.unusable:
        show(asdict(totals), as_json, text)
    if totals.unusable:
        raise DataError(f"{len(totals.unusable)} of {len(paths)} shards cannot be used; see the lines above")
