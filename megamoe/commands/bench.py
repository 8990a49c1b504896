"""`megamoe bench data | checkpoint`."""

from __future__ import annotations

from pathlib import Path

import click

PATH = click.Path(path_type=Path)


@click.group()
def bench() -> None:
    """Measure this system beside its peers, in one run on this machine."""


@bench.command(name="data", short_help="The loader beside webdataset.")
@click.option(
    "--folder", type=PATH, default=Path("data/bench"), show_default=True, help="Folder in which the shards are drawn."
)
@click.option("--samples", type=click.IntRange(min=600), default=8000, show_default=True, help="Pictures to read.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Timed rounds per reader, after one warm-up round.",
)
@click.option(
    "--side",
    type=click.IntRange(224, 4096),
    default=224,
    show_default=True,
    help="Side of the drawn pictures in pixels; all are handed over at 224.",
)
@click.option("--json", "json_file", type=PATH, metavar="FILE", help="File to which all figures are written.")
def bench_data_verb(folder: Path, samples: int, rounds: int, side: int, json_file: Path | None) -> None:
    """Pictures per second that the loader gives, beside webdataset and beside what the cores can decode."""
    import json

    from megamoe.bench.loader import bench_data

    result = bench_data(folder, samples, rounds, side)
    click.echo(f"{result['processes']} processes, {result['kilobytes_per_picture']:.1f} KB per picture")
    for name, rate in result["samples_per_second"].items():
        click.echo(f"  {name.replace('_', ' '):<26}{rate:>8,.0f} pictures/s")
    for name in ("ratio_decode_limit", "ratio_shared_limit", "ratio_webdataset", "ratio_webdataset_simplejpeg"):
        click.echo(f"  {name:<26}{result[name]:>8.2f}")
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


@bench.command(name="checkpoint", short_help="Saving and loading beside DeepSpeed, DCP and torch.save.")
@click.argument("config", type=PATH)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--nproc", type=click.IntRange(min=1), default=4, show_default=True, help="Processes, one rank each.")
@click.option(
    "--folder",
    type=PATH,
    default=Path("data/bench/checkpoint"),
    show_default=True,
    help="Folder in which checkpoints are written.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Timed rounds of each way to save, after one warm-up round.",
)
@click.option("--json", "json_file", type=PATH, metavar="FILE", help="File to which all figures are written.")
def bench_checkpoint_verb(
    config: Path, overrides: tuple[str, ...], nproc: int, folder: Path, rounds: int, json_file: Path | None
) -> None:
    """Seconds to save and load the state of CONFIG's model in training, and how long training stands for a save."""
    import json

    from megamoe.bench.saving import as_table, bench_checkpoint

    result = bench_checkpoint(config, overrides, nproc, folder, rounds)
    click.echo(as_table(result))
    for name, why in result["failures"].items():
        click.echo(f"{name}: {why}", err=True)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
