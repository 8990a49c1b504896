"""Define `megamoe data checksum`: its arguments, options and printed output."""

from __future__ import annotations

import click

from megamoe.commands.data.options import as_json, cluster, dry_run, processes, show


@click.command()
@click.argument("shards")
@click.option("--write", "action", flag_value="write", help="Write SHA256SUMS into each folder of shards.")
@click.option("--verify", "action", flag_value="verify", help="Compare the shards with the SHA256SUMS beside them.")
@dry_run
@processes
@cluster
@as_json
@click.pass_context
def checksum(
    ctx: click.Context, shards: str, action: str | None, dry_run: bool, processes: int | None, as_json: bool
) -> None:
    """Print, write or verify the SHA-256 of each shard of SHARDS, as `sha256sum` does.

    Without an option, the sums are printed. After an interruption, --write continues where it stopped. The exit status
    of --verify is 1 if a shard differs, is missing, cannot be read or has no sum.
    """
    from dataclasses import asdict

    from data_tools.verbs.checksum import SUMS, shard_sums, sum_line, verify_sums, write_sums
    from megamoe.data.shards.expand import local_shards

    paths = local_shards([shards])
    if dry_run:
        folders = sorted({str(shard.parent / SUMS) for shard in paths})
        files = folders if action == "write" else []
        text = f"{len(paths):,} shards would be read; {'written: ' + ', '.join(files) if files else 'nothing written'}"
        show({"shards": len(paths), "files": files, "dry_run": True}, as_json, text)
    elif action == "verify":
        verdict = verify_sums(paths, processes)
        lines = [f"{name}: {what}" for what, names in _named(asdict(verdict)) for name in names]
        others = f"; {verdict.not_asked:,} other listed files were not read" if verdict.not_asked else ""
        lines.append(f"{verdict.right:,} of {len(paths):,} shards are right{others}")
        show(asdict(verdict), as_json, "\n".join(lines))
        ctx.exit(1 if verdict.bad else 0)
    elif action == "write":
        written = write_sums(paths, processes)
        lines = [f"{name}: its sum differs from the one listed before" for name in written.changed]
        resumed = f", {written.resumed:,} of them by an earlier run" if written.resumed else ""
        lines.append(f"{', '.join(map(str, written.files))}: {written.shards:,} shards{resumed}")
        result = asdict(written) | {"files": [str(path) for path in written.files]}
        show(result, as_json, "\n".join(lines))
    else:
        sums = {}
        for shard, digest in shard_sums(paths, processes):
            sums[str(shard)] = digest
            if not as_json:
                click.echo(sum_line(digest, str(shard)), nl=False)
        if as_json:
            show(sums, as_json, "")


def _named(verdict: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    words = {"differ": "DIFFERS", "missing": "MISSING", "no_sum": "has no sum", "unreadable": "cannot be read"}
    return [(word, verdict[name]) for name, word in words.items()]
