"""`megamoe eval`."""

from __future__ import annotations

from pathlib import Path

import click

PATH = click.Path(path_type=Path)


@click.command(name="eval", short_help="Caption held-out pictures and count the right ones.")
@click.argument("source", type=PATH, metavar="CHECKPOINT|RUN")
@click.option("--data", multiple=True, metavar="SHARDS", help="Held-out shards.  [default: data.validation of the run]")
@click.option("--task", type=click.Choice(["caption"]), default="caption", show_default=True)
@click.option("--limit", type=click.IntRange(min=1), help="Samples to look at.  [default: all]")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Pictures at a time.")
@click.option("--name", default="validation", show_default=True, help="Name of the split in RUN/eval.json.")
def evaluate(source: Path, data: tuple[str, ...], task: str, limit: int | None, batch: int, name: str) -> None:
    """Caption held-out pictures and compare with their true captions; figures go to RUN/eval.json."""
    from megamoe.core.run_folder import RunFolder
    from megamoe.evaluate.caption import evaluate_caption
    from megamoe.evaluate.results import results_folder

    result = evaluate_caption(source, list(data), name, limit, batch)
    click.echo(f"{task} on {name}")
    for key, value in result.items():
        if isinstance(value, int | float):
            click.echo(f"  {key.replace('_', ' '):<14}{f'{value:.4f}' if isinstance(value, float) else f'{value:,}':>10}")
    click.echo(f"written to {RunFolder(results_folder(source)).results}")
