"""The `megamoe data` verbs."""

from __future__ import annotations

import click

from data_tools.commands.build import build
from data_tools.commands.dedup import dedup
from data_tools.commands.filter import filter_
from data_tools.commands.index import index
from data_tools.commands.reshard import reshard
from data_tools.commands.split import split
from data_tools.commands.synth import synth
from data_tools.commands.tokenizer import tokenizer


@click.group()
def data() -> None:
    """Make, check and keep image-text shards."""


for command in (synth, build, tokenizer, index, filter_, dedup, split, reshard):
    data.add_command(command)
