"""Define `megamoe data repair`: its arguments, options and printed output."""

from __future__ import annotations

from pathlib import Path

import click

from megamoe.commands.data.options import FOLDER, as_json, cluster, dry_run, processes, show


@click.command()
@click.argument("shards")
@click.argument("out", type=FOLDER)
@click.option(
    "--decode/--no-decode",
    default=True,
    show_default=True,
    help="Decode each picture, and save only samples that can be decoded.",
)
@dry_run
@processes
@cluster
@as_json
@click.pass_context
def repair(
    ctx: click.Context, shards: str, out: Path, decode: bool, dry_run: bool, processes: int | None, as_json: bool
) -> None:
    """Save every good sample of SHARDS to intact shards of the same names in OUT.

    OUT/NAME.lost.jsonl lists what could not be saved. SHARDS are only read; a shard without a fault is copied. After an
    interruption, the same command continues after the last finished shard. The exit status is 1 if anything was lost.
    """
    import sys
    from collections import Counter
    from dataclasses import asdict

    from tqdm import tqdm

    from data_tools.verbs.repair import COPIED, repair_shards
    from megamoe.data.shards.expand import local_shards

    paths = local_shards([shards])
    lost: Counter[str] = Counter()
    actions: Counter[str] = Counter()
    saved = passed_over = 0
    details = []
    for each in repair_shards(paths, out, decode, dry_run, processes):
        lost.update(each.lost)
        actions[each.action] += 1
        saved, passed_over = saved + each.saved, passed_over + each.passed_over
        if each.action == COPIED:
            continue
        details.append(asdict(each))
        if not as_json:
            causes = ", ".join(f"{cause} {count:,}" for cause, count in each.lost.items())
            lines = [f"{each.shard}: {each.action}, {each.saved:,} samples saved; lost: {causes or 'nothing'}"]
            lines += [f"  {note}" for note in each.notes]
            for example in each.examples:
                where = ", ".join(f"{start}-{end}" for start, end in example.ranges)
                lines.append(f"  {example.key or '?'} (bytes {where}): {example.cause}: {example.reason}")
            hidden = sum(each.lost.values()) - len(each.examples)
            lines += [f"  and {hidden:,} more"] if hidden > 0 else []
            tqdm.write("\n".join(lines), file=sys.stdout)
    result = {
        "shards": len(paths),
        "actions": dict(actions),
        "saved": saved,
        "lost": dict(lost.most_common()),
        "bytes_passed_over": passed_over,
        "changed": details,
        "dry_run": dry_run,
    }
    did = ", ".join(f"{count:,} {action}" for action, count in actions.items())
    text = [f"{'would be: ' if dry_run else ''}{len(paths):,} shards: {did}; {saved:,} samples saved"]
    text += [f"  lost, {cause}: {count:,}" for cause, count in lost.most_common()]
    if lost and not dry_run:
        text.append(f"each is named in {out}/NAME.lost.jsonl")
    show(result, as_json, "\n".join(text))
    ctx.exit(1 if lost else 0)
