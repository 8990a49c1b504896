"""`megamoe generate`."""

from __future__ import annotations

from pathlib import Path

import click

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("source", type=PATH, metavar="CHECKPOINT|RUN")
@click.argument("image", type=PATH)
@click.option("--prompt", default="", metavar="TEXT", help="Beginning of the caption, to be continued.")
def generate(source: Path, image: Path, prompt: str) -> None:
    """Write the caption of a picture."""
    from megamoe.evaluate.caption_image import caption_image

    click.echo(caption_image(source, image, prompt))
