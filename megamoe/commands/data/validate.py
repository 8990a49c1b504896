"""Define `megamoe data validate`: its arguments, options and printed output."""

from __future__ import annotations

from pathlib import Path

import click

from megamoe.commands.data.options import FILE, as_json, cluster, processes, show

_NAMED = 3  # problems of each cause named per shard; the report file has all


@click.command()
@click.argument("shards")
@click.option(
    "--decode/--no-decode", default=True, show_default=True, help="Decode each picture, or only check its first bytes."
)
@click.option("--report", type=FILE, help="Write all problems to this file, one JSON object per shard and line.")
@processes
@cluster
@as_json
@click.pass_context
def validate(
    ctx: click.Context, shards: str, decode: bool, report: Path | None, processes: int | None, as_json: bool
) -> None:
    """Check SHARDS for damage: tars, pictures, captions, keys and indexes.

    The exit status is 1 if anything is wrong.
    """
    import json
    import sys
    from collections import Counter
    from contextlib import ExitStack

    from tqdm import tqdm

    from data_tools.verbs.validate import Problem, validate_shards
    from megamoe.core.files import atomic_file
    from megamoe.data.shards.expand import local_shards

    def describe(problems: list[Problem]) -> list[str]:
        by_cause: dict[str, list[Problem]] = {}
        for problem in problems:
            by_cause.setdefault(problem.cause, []).append(problem)
        lines = []
        for cause, some in by_cause.items():
            named = [each.detail if each.key is None else f"{each.key} ({each.detail})" for each in some[:_NAMED]]
            more = [f"and {len(some) - _NAMED} more"] if len(some) > _NAMED else []
            lines.append(f"  {cause}: {len(some)}: {', '.join(named + more)}")
        return lines

    paths = local_shards([shards])
    causes: Counter[str] = Counter()
    bad: dict[str, None] = {}
    samples = good = 0
    with ExitStack() as stack:
        out = stack.enter_context(atomic_file(report)) if report else None
        for each in validate_shards(paths, decode, processes):
            samples, good = samples + each.samples, good + each.good
            causes.update(problem.cause for problem in each.problems)
            if each.problems:
                bad[str(each.shard)] = None
            if out:
                out.write(json.dumps(each.as_json()).encode() + b"\n")
            if not as_json:
                count = len(each.problems)
                state = f"{count:,} problem{'' if count == 1 else 's'}" if count else "ok"
                seen = f", {each.samples:,} samples" if not each.follow_up else " with other shards"
                lines = [f"{each.shard}: {state}{seen}", *describe(each.problems)]
                tqdm.write("\n".join(lines), file=sys.stdout)
    result = {
        "shards": len(paths),
        "bad_shards": list(bad),
        "samples": samples,
        "good": good,
        "causes": dict(causes.most_common()),
    }
    text = [f"{len(paths):,} shards, {len(bad):,} with problems; {samples:,} samples, {good:,} good"]
    text += [f"  {cause}: {count:,}" for cause, count in causes.most_common()]
    show(result, as_json, "\n".join(text))
    ctx.exit(1 if causes else 0)
