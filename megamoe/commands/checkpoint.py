"""`megamoe checkpoint ls | verify | prune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from megamoe.checkpoint.listing import Listed
    from megamoe.checkpoint.verify import Verdict

PATH = click.Path(path_type=Path)
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.group()
def checkpoint() -> None:
    """List, verify and delete the checkpoints of a run."""


@checkpoint.command(short_help="List the checkpoints of a run.")
@click.argument("run", type=PATH)
@as_json
def ls(run: Path, as_json: bool) -> None:
    """List the checkpoints of RUN: step, time, size, layout, loss, and whether each looks whole (sizes, no checksums)."""
    from megamoe.checkpoint.listing import list_checkpoints

    listed = list_checkpoints(run)
    if as_json:
        click.echo(json.dumps([vars(each) | {"folder": str(each.folder)} for each in listed]))
        return
    if not listed:
        click.echo(f"{run}: no checkpoints")
    else:
        _table(["step", "written (UTC)", "size", "loss", "status", "layout"], [_row(each) for each in listed])
    for each in listed:
        if each.problem:
            click.echo(each.problem, err=True)


@checkpoint.command(short_help="Read checkpoints whole and check every byte.")
@click.argument("source", type=PATH, metavar="RUN|CHECKPOINT")
@as_json
@click.pass_context
def verify(ctx: click.Context, source: Path, as_json: bool) -> None:
    """Read a checkpoint, or all complete ones of a run, and hold every byte against its checksum.

    Every weight, every moment of the optimizer and every expert must be there exactly once, as its config says. Exit
    status: 1 if a checkpoint is not whole.
    """
    from tqdm import tqdm

    from megamoe.checkpoint.verify import to_verify, verify_checkpoint

    folders, size = to_verify(source)
    with tqdm(total=size, unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=None) as bar:
        verdicts = [verify_checkpoint(folder, bar.update) for folder in folders]
    if as_json:
        click.echo(json.dumps([vars(verdict) | {"folder": str(verdict.folder)} for verdict in verdicts]))
    else:
        for verdict in verdicts:
            _say(verdict)
    ctx.exit(1 if any(verdict.problems for verdict in verdicts) else 0)


@checkpoint.command(short_help="Delete old checkpoints of a run.")
@click.argument("run", type=PATH)
@click.option("--keep", type=click.IntRange(min=1), required=True, metavar="K", help="The last K stay.")
@click.option("--every", type=click.IntRange(min=1), metavar="N", help="Those of every N-th step stay, too.")
@click.option("--abandoned", is_flag=True, help="Delete those of abandoned histories, too.")
@click.option("--dry-run", is_flag=True, help="Say what would be deleted, and delete nothing.")
@as_json
def prune(run: Path, keep: int, every: int | None, abandoned: bool, dry_run: bool, as_json: bool) -> None:
    """Delete all but the last K checkpoints of RUN.

    One that looks damaged does not count among the K; it is named and left alone.
    """
    from megamoe.checkpoint.folders import delete, to_delete
    from megamoe.checkpoint.listing import list_checkpoints

    listed = list_checkpoints(run)
    whole = [each for each in listed if each.status == "complete"]
    steps = set(to_delete([each.step for each in whole], keep, every or 0))
    doomed = [each for each in whole if each.step in steps]
    if abandoned:
        doomed += [each for each in listed if each.folder.name.startswith(".abandoned-")]
    for each in doomed:
        if not dry_run:
            delete(each.folder)
        if not as_json:
            click.echo(f"{'would delete' if dry_run else 'deleted'} {each.folder} ({_bytes(each.size)})")
    gone = {each.folder for each in doomed}
    left = [each for each in listed if each.folder not in gone and each.status == "damaged"]
    if as_json:
        rows = {"deleted": doomed, "kept": [each for each in whole if each.folder not in gone], "damaged": left}
        click.echo(json.dumps({k: [str(each.folder) for each in v] for k, v in rows.items()} | {"dry_run": dry_run}))
    else:
        freed = _bytes(sum(each.size for each in doomed))
        word = "would be deleted" if dry_run else "deleted"
        click.echo(f"{len(doomed)} {word} ({freed}), {len(whole) - len(gone & {w.folder for w in whole})} stay")
    for each in left:
        click.echo(f"left alone: {each.problem}", err=True)


def _say(verdict: Verdict) -> None:
    for problem in verdict.problems:
        click.echo(problem, err=True)
    if verdict.problems:
        click.echo(f"{verdict.folder}: NOT WHOLE")
    else:
        files = f"{verdict.files} file{'s' * (verdict.files != 1)}, {_bytes(verdict.bytes)}"
        parts = f"{verdict.weights:,} weights, {verdict.moments:,} moments, {verdict.experts:,} experts"
        click.echo(f"{verdict.folder}: whole: {files}, {parts}")


def _row(each: Listed) -> list[str]:
    return [
        f"{each.step:,}",
        each.written[:19].replace("T", " "),
        _bytes(each.size),
        "-" if each.loss is None else f"{each.loss:.4f}",
        each.status,
        each.layout or "-",
    ]


def _table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [
            cell.rjust(w) if i in (0, 2, 3) else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
