"""`megamoe data index`."""

from __future__ import annotations

from pathlib import Path

import click

from data_tools.commands.options import FOLDER


@click.command()
@click.argument("shards")
@click.option("--out", type=FOLDER, help="Folder for the indexes. Default: beside each shard.")
def index(shards: str, out: Path | None) -> None:
    """Read each tar of SHARDS once, check that it is whole, and write where its samples lie."""
    import sys

    from tqdm import tqdm

    from megamoe.data.index import build_index, index_path, write_index
    from megamoe.data.shards import expand_shards
    from megamoe.errors import DataError

    paths = expand_shards([shards])
    unusable = samples = 0
    with tqdm(paths, desc="index", unit="shard", file=sys.stderr, disable=None) as bar:
        for shard in bar:
            try:
                made = build_index(shard)
                write_index(made, index_path(shard, out))
            except DataError as error:
                unusable += 1
                bar.write(str(error), file=sys.stderr)
                continue
            samples += made.samples
            problems = [f"{key}: {why}" for key, why in made.incomplete] + [f"{key}: twice" for key in made.duplicates]
            if problems:
                bar.write(f"shard {shard}: {len(problems)} samples left out ({'; '.join(problems)})", file=sys.stderr)
    if unusable:
        raise DataError(f"{unusable} of {len(paths)} shards cannot be used; see the lines above")
    click.echo(f"{len(paths)} shards, {samples} samples")
