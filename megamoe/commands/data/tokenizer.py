"""Define `megamoe data tokenizer`: its arguments, options and printed output."""

from __future__ import annotations

from pathlib import Path

import click

from megamoe.commands.data.options import as_json, dry_run, show


@click.command()
@click.argument("shards")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--vocab-size", type=click.IntRange(1), required=True, help="Size of the vocabulary in pieces, at least 261.")
@dry_run
@as_json
def tokenizer(shards: str, out: Path, vocab_size: int, dry_run: bool, as_json: bool) -> None:
    """Train a sentencepiece vocabulary on the captions of SHARDS and write OUT.model."""
    from megamoe.data.sample.vocabulary import check_size, model_path, train_tokenizer
    from megamoe.data.shards.expand import expand_shards
    from megamoe.data.shards.sequential import read_captions

    path = model_path(out)
    if dry_run:
        check_size(vocab_size)
        count = len(expand_shards([shards]))
        text = f"{path}: {vocab_size} pieces from the captions of {count} shards; nothing was written"
        show({"model": str(path), "shards": count, "dry_run": True}, as_json, text)
        return
    lost: list[str] = []
    captions = read_captions([shards], on_lost=lambda name, reason: lost.append(f"{name}: {reason}"))
    made = train_tokenizer(captions, out, vocab_size)
    short = "" if made.size == vocab_size else f" (the captions have no more; {vocab_size} were asked for)"
    result = {"model": str(path), "pieces": made.size, "fingerprint": made.fingerprint, "lost": lost, "dry_run": False}
    show(result, as_json, f"{path}: {made.size} pieces{short}")
    if lost:
        click.echo(f"{len(lost)} samples lost; the first: {lost[0]}", err=True)
