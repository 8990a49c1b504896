"""`megamoe plan`."""

from __future__ import annotations

from pathlib import Path

import click

PATH = click.Path(path_type=Path)


@click.command()
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
