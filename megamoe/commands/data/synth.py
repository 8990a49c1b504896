"""Define `megamoe data synth`: its arguments, options and printed output."""

from __future__ import annotations

from pathlib import Path

import click

from megamoe.commands.data.options import FOLDER, as_json, dry_run, show


@click.command()
@click.argument("out", type=FOLDER)
@click.option("--samples", type=click.IntRange(1), required=True, help="Number of training samples.")
@click.option("--seed", type=click.IntRange(0), required=True, help="Seed of the set; the same seed gives the same bytes.")
@click.option(
    "--level",
    type=click.Choice(["1", "2", "3"]),
    default="1",
    show_default=True,
    help="Difficulty: 1 is one object at a place, 2 several equal objects, 3 two objects in a relation.",
)
@click.option(
    "--image-size", type=click.IntRange(32, 4096), default=64, show_default=True, help="Side of the pictures in pixels."
)
@click.option("--shard-size", type=click.IntRange(1), default=2000, show_default=True, help="Samples per shard.")
@click.option(
    "--validation",
    type=click.IntRange(0),
    default=1000,
    show_default=True,
    help="Samples of OUT/validation (other pictures), and of OUT/combinations (combinations that training never shows).",
)
@click.option("--quality", type=click.IntRange(1, 100), default=90, show_default=True, help="JPEG quality of the pictures.")
@click.option(
    "--corrupt",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of training pictures whose bytes are damaged, as in a crawl.",
)
@dry_run
@as_json
def synth(
    out: Path,
    samples: int,
    seed: int,
    level: str,
    image_size: int,
    shard_size: int,
    validation: int,
    quality: int,
    corrupt: float,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Draw pictures of coloured shapes with captions into OUT/train, OUT/validation and OUT/combinations."""
    from data_tools.verbs.synth import synthesize

    shards = synthesize(
        out,
        samples=samples,
        seed=seed,
        level=int(level),
        image_size=image_size,
        shard_size=shard_size,
        validation=validation,
        quality=quality,
        corrupt=corrupt,
        dry_run=dry_run,
    )
    text = f"{out}: {samples} training samples, {validation} validation, {validation} combinations"
    if dry_run:
        text += f"; {len(shards)} shards, nothing was written"
    result = {"train": samples, "validation": validation, "combinations": validation}
    show({"out": str(out), **result, "shards": [str(shard) for shard in shards], "dry_run": dry_run}, as_json, text)
