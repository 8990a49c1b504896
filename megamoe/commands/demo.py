"""`megamoe demo`."""

from __future__ import annotations

import click


@click.command(short_help="All of it on a CPU in minutes, a killed worker included.")
@click.pass_context
def demo(ctx: click.Context) -> None:
    """Make shards, train a small model on this CPU with a worker killed on the way, evaluate, report."""
    from megamoe.commands.demo_run import run_demo

    ctx.exit(run_demo())
