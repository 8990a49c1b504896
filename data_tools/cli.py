"""The `megamoe data` verbs."""

from __future__ import annotations

import click

from data_tools.commands.build import build
from data_tools.commands.checksum import checksum
from data_tools.commands.dedup import dedup
from data_tools.commands.filter import filter_
from data_tools.commands.index import index
from data_tools.commands.repair import repair
from data_tools.commands.reshard import reshard
from data_tools.commands.split import split
from data_tools.commands.stats import stats
from data_tools.commands.synth import synth
from data_tools.commands.tokenizer import tokenizer
from data_tools.commands.validate import validate


@click.group()
def data() -> None:
    """Make, check and keep image-text shards."""


for command in (build, synth, tokenizer, index, validate, repair, stats, checksum, filter_, dedup, split, reshard):
    data.add_command(command)
