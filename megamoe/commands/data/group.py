"""Collect the verbs of `megamoe data` in one command group."""

from __future__ import annotations

import click

from megamoe.commands.data.build import build
from megamoe.commands.data.checksum import checksum
from megamoe.commands.data.dedup import dedup
from megamoe.commands.data.filter import filter_
from megamoe.commands.data.index import index
from megamoe.commands.data.repair import repair
from megamoe.commands.data.reshard import reshard
from megamoe.commands.data.split import split
from megamoe.commands.data.stats import stats
from megamoe.commands.data.synth import synth
from megamoe.commands.data.tokenizer import tokenizer
from megamoe.commands.data.validate import validate


@click.group()
def data() -> None:
    """Build, check and maintain image-text shards."""


for command in (build, synth, tokenizer, index, validate, repair, stats, checksum, filter_, dedup, split, reshard):
    data.add_command(command)
