"""Define `megamoe data stats`: its arguments, options and printed output."""

from __future__ import annotations

from pathlib import Path

import click

from megamoe.commands.data.options import FILE, FOLDER, as_json, cluster, dry_run, processes, show


@click.command()
@click.argument("shards")
@click.option("--out", type=FOLDER, help="Write stats.json and stats.html to this folder.  [default: only print]")
@click.option(
    "--sample", type=click.IntRange(0, 500), default=24, show_default=True, help="Number of sample pictures on the page."
)
@click.option("--tokenizer", type=FILE, help="Vocabulary (.model) to count the tokens of captions with.")
@dry_run
@processes
@cluster
@as_json
@click.pass_context
def stats(
    ctx: click.Context,
    shards: str,
    out: Path | None,
    sample: int,
    tokenizer: Path | None,
    dry_run: bool,
    processes: int | None,
    as_json: bool,
) -> None:
    """Describe SHARDS: sizes, captions, words, numbers in the json, and a page with figures and sample pictures.

    The exit status is 1 if a shard is damaged; its figures then cover what lies before the damage.
    """
    from data_tools.stats.shard_stats import collect_stats
    from megamoe.data.shards.expand import local_shards

    paths = local_shards([shards])
    if dry_run:
        written = [str(out / name) for name in ("stats.json", "stats.html")] if out else []
        text = f"{len(paths):,} shards would be read; written: {', '.join(written) or 'nothing'}"
        show({"shards": len(paths), "files": written, "dry_run": True}, as_json, text)
        return
    found = collect_stats(paths, tokenizer=tokenizer, sample=sample if out else 0, processes=processes)
    from data_tools.stats.stats_page import summary, write_stats  # matplotlib: not needed by the worker processes

    made = write_stats(found, out, shards, sample) if out else []
    lines = [f"{label + ':':<24}{value}" for label, value in summary(found).items()]
    lines += [f"{path}" for path in made]
    show(found.as_json(), as_json, "\n".join(lines))
    for line in found.damaged:
        click.echo(line, err=True)
    ctx.exit(1 if found.damaged else 0)
