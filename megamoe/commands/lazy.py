"""A group of verbs whose files are imported only when they run, so that ``--help`` answers at once."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

import click


class Verb(NamedTuple):
    """Where a verb is, and its line in the help of its group."""

    place: str
    """``module:attribute``."""

    about: str


class LazyGroup(click.Group):
    """A group that imports a verb when it is called, and nothing for the list of its verbs.

    Args:
        verbs: By name, in the order of the help.
    """

    def __init__(self, *arguments: Any, verbs: Mapping[str, Verb], **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._verbs = verbs

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the help, with commands that were added at the end."""
        return [*self._verbs, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb; return None if there is none of this name."""
        if cmd_name not in self._verbs:
            return super().get_command(ctx, cmd_name)
        module, attribute = self._verbs[cmd_name].place.split(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing one."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.about) for name, verb in self._verbs.items()])
