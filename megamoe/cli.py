"""The ``megamoe`` command: a verb per function, heavy imports inside the verbs so that ``--help`` answers at once.

Exit status: 0 done; 2 the request is wrong, said in one line on stderr; 75 a training stopped and saved when it was asked
to; 130 interrupted; else a failure while running. All of them are in docs/faults.md.
"""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from megamoe import __version__
from megamoe.commands.checkpoint import checkpoint
from megamoe.commands.launch import launch
from megamoe.core.errors import UserError
from megamoe.core.exit_status import FAILED, REQUEST_IS_WRONG

PATH = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def megamoe() -> None:
    """Train sparse mixture-of-experts vision-language models from tar shards."""


@megamoe.command()
@click.argument("config", type=PATH)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--nproc", type=click.IntRange(min=1), help="Processes on this machine, one rank each.  [default: 1]")
@click.option(
    "--resume",
    default="none",
    show_default=True,
    metavar="auto|none|PATH",
    help="auto: the run's newest good checkpoint, or the beginning when it has none; none: a new run, in a folder without "
    "one; PATH: a certain checkpoint.",
)
@click.pass_context
def train(ctx: click.Context, config: Path, overrides: tuple[str, ...], nproc: int | None, resume: str) -> None:
    """Train as CONFIG says, with settings changed by KEY=VALUE.

    Starts and supervises local processes: when one dies, all go on from the last checkpoint. Started by torchrun, by
    srun with a task per rank or by mpirun, it is one of these ranks.
    """
    from launcher.workers.environment import rank_environment
    from megamoe.config import load_config

    os.environ.update(rank_environment(os.environ))
    settings = load_config(config, overrides)
    if _is_rank():
        if nproc is not None and nproc != int(os.environ["WORLD_SIZE"]):
            raise UserError(f"--nproc {nproc}: this is one of WORLD_SIZE={os.environ['WORLD_SIZE']} ranks; leave it out")
        from megamoe.train.rank import train as train_rank

        ctx.exit(train_rank(settings, resume))

    from launcher.local.launch import launch_local
    from megamoe.metrics.metrics_file import refuse_existing
    from megamoe.parallel.layout import plan_layout

    # Whatever can be known to be wrong is said here, once, before any process starts.
    plan_layout(settings, world_size=nproc or 1)
    if resume == "none":
        refuse_existing(settings.run.folder)
    elif resume != "auto" and not Path(resume).exists():
        raise UserError(f"--resume {resume}: no such checkpoint; give its folder, or auto for the newest one")
    patience = settings.train.watchdog_seconds
    ctx.exit(
        launch_local(config, overrides, nproc or 1, resume, settings.launch, settings.run.folder, watchdog_seconds=patience)
    )


@megamoe.command(name="eval", short_help="Caption held-out pictures and count the right ones.")
@click.argument("source", type=PATH, metavar="CHECKPOINT|RUN")
@click.option("--data", multiple=True, metavar="SHARDS", help="Held-out shards.  [default: data.validation of the run]")
@click.option("--task", type=click.Choice(["caption"]), default="caption", show_default=True)
@click.option("--limit", type=click.IntRange(min=1), help="Samples to look at.  [default: all]")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Pictures at a time.")
@click.option("--name", default="validation", show_default=True, help="Name of the split in RUN/eval.json.")
def evaluate(source: Path, data: tuple[str, ...], task: str, limit: int | None, batch: int, name: str) -> None:
    """Caption held-out pictures and compare with their true captions; figures go to RUN/eval.json."""
    from megamoe.evaluate.caption import evaluate_caption
    from megamoe.evaluate.results import RESULTS_FILE, results_folder

    result = evaluate_caption(source, list(data), name, limit, batch)
    click.echo(f"{task} on {name}")
    for key, value in result.items():
        if isinstance(value, int | float):
            click.echo(f"  {key.replace('_', ' '):<14}{f'{value:.4f}' if isinstance(value, float) else f'{value:,}':>10}")
    click.echo(f"written to {results_folder(source) / RESULTS_FILE}")


@megamoe.command()
@click.argument("source", type=PATH, metavar="CHECKPOINT|RUN")
@click.argument("image", type=PATH)
@click.option("--prompt", default="", metavar="TEXT", help="Beginning of the caption, to be continued.")
def generate(source: Path, image: Path, prompt: str) -> None:
    """Write the caption of a picture."""
    from megamoe.evaluate.caption_image import caption_image

    click.echo(caption_image(source, image, prompt))


@megamoe.command(short_help="Write the run as one HTML page.")
@click.argument("run", type=PATH)
def report(run: Path) -> None:
    """Write the run as one HTML page: curves, expert load, pictures with captions."""
    from megamoe.report.run_page import write_report

    click.echo(write_report(run))


@megamoe.command()
@click.argument("config", type=PATH)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--nproc", type=click.IntRange(min=1), help="Show how this many ranks would share the work.")
def plan(config: Path, overrides: tuple[str, ...], nproc: int | None) -> None:
    """Show how large the model of CONFIG is, without building it."""
    from megamoe.config import load_config
    from megamoe.config.size import model_size

    settings = load_config(config, overrides)
    size = model_size(settings)
    rows = [
        ("parameters", f"{size.parameters:,}"),
        ("  vision encoder", f"{size.tower('vision.'):,}"),
        ("  decoder", f"{size.tower('decoder.'):,}"),
        ("  of experts", f"{size.expert_parameters:,} in {size.sparse_blocks} sparse blocks"),
        ("active parameters", f"{size.active_parameters:,}"),
        ("FLOPs per token", f"{size.flops_per_token:.4g} forward and backward"),
        ("tokens per step", f"{settings.train.global_batch * settings.data.sequence_length:,}"),
    ]
    if nproc is not None:
        from megamoe.parallel.layout import plan_layout

        layout = plan_layout(settings, world_size=nproc)
        rows.append(("layout", layout.describe()))
        for stage in range(layout.pipeline):
            layers = size.layers[layout.bounds[stage] : layout.bounds[stage + 1]]
            share = sum(layer.flops for layer in layers) / sum(layer.flops for layer in size.layers)
            rows.append((f"  stage {stage}", f"{layers[0].name} to {layers[-1].name}, {share:.0%} of the FLOPs"))
    for label, text in rows:
        click.echo(f"{label:<20}{text}")


@megamoe.command(short_help="All of it on a CPU in minutes, a killed worker included.")
@click.pass_context
def demo(ctx: click.Context) -> None:
    """Make shards, train a small model on this CPU with a worker killed on the way, evaluate, report."""
    from megamoe.commands.demo_run import run_demo

    ctx.exit(run_demo())


megamoe.add_command(checkpoint)
megamoe.add_command(launch)


@megamoe.group()
def bench() -> None:
    """Measure this system beside its peers, in one run on this machine."""


@bench.command(name="data", short_help="The loader beside webdataset.")
@click.option("--folder", type=PATH, default=Path("data/bench"), show_default=True, help="Where its shards are made.")
@click.option("--samples", type=click.IntRange(min=600), default=8000, show_default=True, help="Pictures to read.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Of each reader, after a first one."
)
@click.option(
    "--side", type=click.IntRange(224, 4096), default=224, show_default=True, help="Of the pictures; all are given at 224."
)
@click.option("--json", "json_file", type=PATH, metavar="FILE", help="Write all figures there.")
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
    "--folder", type=PATH, default=Path("data/bench/checkpoint"), show_default=True, help="Where they are written."
)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Of each, after a first one.")
@click.option("--json", "json_file", type=PATH, metavar="FILE", help="Write all figures there.")
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


@megamoe.command(
    short_help="Make and keep shards.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []},
    options_metavar="",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="VERB ...")
@click.pass_context
def data(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Make and keep shards; `megamoe data --help` lists its verbs."""
    from megamoe.commands.data.group import data as data_verbs

    ctx.exit(data_verbs.main(list(arguments), prog_name=ctx.command_path, standalone_mode=False) or 0)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit status."""
    try:
        status = megamoe.main(arguments, prog_name="megamoe", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        status = error.exit_code
    except click.ClickException as error:
        hint = f" (see {error.ctx.command_path} --help)" if isinstance(error, click.UsageError) and error.ctx else ""
        _say(f"error: {_one_line(error.format_message())}{hint}")
        status = error.exit_code
    except UserError as error:
        _say(f"error: {_one_line(error)}")
        status = REQUEST_IS_WRONG
    except click.Abort:
        _say(f"rank {os.environ['RANK']} interrupted" if _is_rank() else "interrupted")
        status = 130
    except Exception:
        if not _is_rank():
            raise
        _log_traceback()
        status = FAILED
    _leave(status if isinstance(status, int) else 0)


def _is_rank() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _log_traceback() -> None:
    """To the log that the launcher named, or to stderr."""
    path = os.environ.get("MEGAMOE_LOG")
    if path is None:
        traceback.print_exc()
        return
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as log:
        traceback.print_exc(file=log)


def _leave(status: int) -> NoReturn:
    if not _is_rank():
        sys.exit(status)
    # A rank that failed must end at once: an orderly exit waits for threads that are stuck in a collective, while its peers
    # and its launcher wait for it. One that is done must not fail now: threads of gloo that want the interpreter while it
    # is taken down abort the process (pytorch/pytorch#179291).
    if not status:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _say(text: str) -> None:
    click.echo(f"megamoe: {text}", err=True)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
