"""Collect the verbs of `megamoe data` in one command group."""

from __future__ import annotations

import click

from megamoe.commands.lazy import LazyGroup, Verb

_VERBS = {
    "build": Verb("megamoe.commands.data.build:build", "Make image-text shards from pictures, a table or URLs."),
    "synth": Verb("megamoe.commands.data.synth:synth", "Draw shards of coloured shapes with captions."),
    "tokenizer": Verb("megamoe.commands.data.tokenizer:tokenizer", "Train a sentencepiece vocabulary on captions."),
    "index": Verb("megamoe.commands.data.index:index", "Write where the samples of each tar lie."),
    "validate": Verb("megamoe.commands.data.validate:validate", "Find what a training run would stumble over."),
    "repair": Verb("megamoe.commands.data.repair:repair", "Save every good sample of damaged tars."),
    "stats": Verb("megamoe.commands.data.stats:stats", "Describe shards in figures and on a page."),
    "checksum": Verb("megamoe.commands.data.checksum:checksum", "Print, write or verify SHA-256 sums of shards."),
    "filter": Verb("megamoe.commands.data.filter:filter_", "Keep the samples that satisfy conditions."),
    "dedup": Verb("megamoe.commands.data.dedup:dedup", "Keep one of several equal or similar pictures."),
    "split": Verb("megamoe.commands.data.split:split", "Write one folder per part, by key."),
    "reshard": Verb("megamoe.commands.data.reshard:reshard", "Cut shards anew in equal sizes, in order or shuffled."),
}


@click.group(cls=LazyGroup, verbs=_VERBS)
def data() -> None:
    """Build, check and maintain image-text shards."""
