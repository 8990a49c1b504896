"""The `megamoe data` verbs. Imports that take time are inside them."""

from __future__ import annotations

from pathlib import Path

import click

_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.group()
def data() -> None:
    """Make, check and keep image-text shards."""


@data.command()
@click.argument("out", type=_FOLDER)
@click.option("--samples", type=click.IntRange(1), required=True, help="Training samples.")
@click.option("--seed", type=click.IntRange(0), required=True, help="The same seed gives the same bytes.")
@click.option(
    "--level",
    type=click.Choice(["1", "2", "3"]),
    default="1",
    show_default=True,
    help="1: one object at a place; 2: several equal objects; 3: two objects in a relation.",
)
@click.option("--image-size", type=click.IntRange(32, 4096), default=64, show_default=True, help="Side in pixels.")
@click.option("--shard-size", type=click.IntRange(1), default=2000, show_default=True, help="Samples per shard.")
@click.option(
    "--validation",
    type=click.IntRange(0),
    default=1000,
    show_default=True,
    help="Samples of OUT/validation (other pictures) and of OUT/combinations (combinations that training never shows).",
)
@click.option("--quality", type=click.IntRange(1, 100), default=90, show_default=True, help="JPEG quality.")
@click.option(
    "--corrupt",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of training pictures whose bytes are spoilt, as in a crawl.",
)
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
) -> None:
    """Draw pictures of coloured shapes with captions into OUT/train, OUT/validation and OUT/combinations."""
    from data_tools.synth import synthesize

    synthesize(
        out,
        samples=samples,
        seed=seed,
        level=int(level),
        image_size=image_size,
        shard_size=shard_size,
        validation=validation,
        quality=quality,
        corrupt=corrupt,
    )
    click.echo(f"{out}: {samples} training samples, {validation} validation, {validation} combinations")


@data.command()
@click.argument("shards")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--vocab-size", type=click.IntRange(1), required=True, help="Pieces; at least 261.")
def tokenizer(shards: str, out: Path, vocab_size: int) -> None:
    """Train a sentencepiece vocabulary on the captions of SHARDS and write OUT.model."""
    from data_tools.vocabulary import model_path, train_tokenizer
    from megamoe.data.samples import read_captions

    lost: list[str] = []
    captions = read_captions([shards], on_lost=lambda name, reason: lost.append(f"{name}: {reason}"))
    made = train_tokenizer(captions, out, vocab_size)
    short = "" if made.size == vocab_size else f" (the captions have no more; {vocab_size} were asked for)"
    click.echo(f"{model_path(out)}: {made.size} pieces{short}")
    if lost:
        click.echo(f"{len(lost)} samples left out, the first {lost[0]}", err=True)


@data.command()
@click.argument("shards")
@click.option("--out", type=_FOLDER, help="Folder for the indexes. Default: beside each shard.")
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
