"""Define `megamoe data build`: its arguments, options and printed output."""

from __future__ import annotations

from pathlib import Path

import click

from data_tools.sources.item import FORMATS
from megamoe.commands.data import options
from megamoe.commands.data.options import FOLDER

_MODES = ("no", "keep_ratio", "center_crop", "border")
_DISALLOWED = "noai,noimageai,noindex,noimageindex"


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=FOLDER)
@click.option("--input-format", type=click.Choice(FORMATS), help="Format of SOURCE.  [default: detected]")
@click.option("--url-col", help="Column with the URLs.  [default: url or image_url]")
@click.option("--image-col", help="Column with the paths.  [default: image, image_path, filepath, file_name or path]")
@click.option("--caption-col", help="Column with the captions.  [default: caption, text or title]")
@click.option(
    "--image-root", type=FOLDER, help="Folder that relative paths in a table start from.  [default: the table's folder]"
)
@click.option("--captions-optional", is_flag=True, help="Keep pictures without a caption; training does not use them.")
@click.option("--shard-size", type=click.IntRange(1), default=10_000, show_default=True, help="Samples per shard.")
@click.option(
    "--resize-mode",
    type=click.Choice(_MODES),
    default="no",
    show_default=True,
    help='Resize the pictures as img2dataset does; "no" keeps their bytes.',
)
@click.option(
    "--image-size", type=click.IntRange(1, 8192), default=256, show_default=True, help="Size of resized pictures in pixels."
)
@click.option(
    "--encode-quality", type=click.IntRange(1, 100), default=95, show_default=True, help="JPEG quality of resized pictures."
)
@click.option(
    "--max-bytes", type=click.IntRange(1), default=32 << 20, show_default=True, help="Maximum size of one picture in bytes."
)
@click.option("--threads", type=click.IntRange(1), default=32, show_default=True, help="Concurrent downloads per process.")
@click.option(
    "--per-host",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Concurrent downloads from one host, over all processes.",
)
@click.option(
    "--timeout", type=click.FloatRange(0.1), default=10.0, show_default=True, help="Seconds to wait for an answer."
)
@click.option(
    "--retries",
    type=click.IntRange(0, 10),
    default=2,
    show_default=True,
    help="Retries after a fault that may be temporary.",
)
@click.option(
    "--disallowed-header-directives",
    default=_DISALLOWED,
    show_default=True,
    help='Directives of the X-Robots-Tag header that forbid the use of a picture; "" ignores the header.',
)
@click.option("--user-agent", help="User-Agent header; include a way to reach you.  [default: this tool and its version]")
@click.option("--private-hosts", is_flag=True, help="Also download from addresses outside the public internet.")
@click.option(
    "--max-lost",
    type=click.FloatRange(0, 1),
    help="Largest share of samples that may be lost without exit status 1.  [default: 0; with URLs 1]",
)
@click.option("--retry-failed", is_flag=True, help="Retry the failed downloads of finished shards.")
@options.processes
@options.cluster
@options.dry_run
@options.as_json
def build(
    source: Path,
    out: Path,
    input_format: str | None,
    url_col: str | None,
    image_col: str | None,
    caption_col: str | None,
    image_root: Path | None,
    captions_optional: bool,
    shard_size: int,
    resize_mode: str,
    image_size: int,
    encode_quality: int,
    max_bytes: int,
    threads: int,
    per_host: int,
    timeout: float,
    retries: int,
    disallowed_header_directives: str,
    user_agent: str | None,
    private_hosts: bool,
    max_lost: float | None,
    retry_failed: bool,
    processes: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build image-text shards OUT/00000.tar, ... from SOURCE.

    SOURCE is a folder of pictures with .txt or .json files of the same name beside them; a CSV, TSV, JSONL or parquet
    table (or a folder of them) with a column of captions and one of paths or URLs; or a .txt list of URLs. All other
    columns are kept in each sample's .json. Columns, keys and files are named as img2dataset names them.

    A sample that cannot be used is lost: it is counted, and named in the .parquet beside each shard. After an
    interruption, the same command continues where it stopped.

    The exit status is 1 if more samples are lost than --max-lost allows, or if the shards hold no sample.
    """
    from data_tools.distribute.jobs import cluster_in_use
    from data_tools.sources.columns import Names
    from data_tools.sources.download import USER_AGENT, DownloadOptions
    from data_tools.verbs.build import BuildOptions, plan
    from data_tools.verbs.build import build as make
    from data_tools.writing.build_shard import PictureOptions

    words = tuple(word.strip() for word in disallowed_header_directives.split(",") if word.strip())
    agent = user_agent or USER_AGENT
    wanted = BuildOptions(
        shard_size,
        input_format,
        Names(url_col, image_col, caption_col, image_root, not captions_optional),
        PictureOptions(resize_mode, image_size, encode_quality),
        DownloadOptions(threads, per_host, timeout, retries, max_bytes, words, agent, private_hosts),
    )
    if dry_run:
        found = plan(source, wanted)
        samples, shards = sum(chunk.samples for chunk in found.chunks), len(found.chunks)
        text = f"{source}: {found.kind}, {found.note}; {samples} samples for {shards} shards in {out}; nothing was written"
        options.show({"format": found.kind, "count": samples, "shards": shards}, as_json, text)
        return
    report = make(source, out, wanted, processes, cluster=cluster_in_use(), retry_failed=retry_failed)
    options.show(report.as_dict(), as_json, str(report))
    allowed = max_lost if max_lost is not None else float(report.source.online)
    if not report.totals["successes"] or report.lost > allowed * report.totals["count"]:
        raise SystemExit(1)
