"""`megamoe data tokenizer`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("shards")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--vocab-size", type=click.IntRange(1), required=True, help="Pieces; at least 261.")
def tokenizer(shards: str, out: Path, vocab_size: int) -> None:
    """Train a sentencepiece vocabulary on the captions of SHARDS and write OUT.model."""
    from megamoe.data.samples import read_captions
    from megamoe.data.vocabulary import model_path, train_tokenizer

    lost: list[str] = []
    captions = read_captions([shards], on_lost=lambda name, reason: lost.append(f"{name}: {reason}"))
    made = train_tokenizer(captions, out, vocab_size)
    short = "" if made.size == vocab_size else f" (the captions have no more; {vocab_size} were asked for)"
    click.echo(f"{model_path(out)}: {made.size} pieces{short}")
    if lost:
        click.echo(f"{len(lost)} samples left out, the first {lost[0]}", err=True)
