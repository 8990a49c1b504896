"""`megamoe bench checkpoint`: compare saving and loading with DeepSpeed's own, plain DCP and plain ``torch.save``.

All of them write the same main parameters and moments (fp32) of one engine that has just trained, flush them to the disk,
and read them back from the disk, not from memory. DeepSpeed writes the weights a second time. Rounds alternate, and each
figure is the median of its rounds, so that other load on the machine affects all alike.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.workers.processes import local_environments
from megamoe.bench.tables import table_head, table_row
from megamoe.config import load_config
from megamoe.core.errors import UserError
from megamoe.parallel.layout import plan_layout


def bench_checkpoint(config: Path, overrides: Sequence[str], ranks: int, folder: Path, rounds: int = 3) -> dict[str, Any]:
    """Measure and return all figures, by name.

    Args:
        config: The model, its layout and its batch; no data is read.
        overrides: ``KEY=VALUE``.
        ranks: Processes on this machine.
        folder: Where checkpoints are written and deleted again: on the file system to be measured.
        rounds: Timed rounds of each method, after one warm-up round.

    Returns:
        ``bytes`` of our checkpoint, ``step_seconds``, ``save_seconds`` and ``load_seconds`` by name, ``stall_seconds``
        (how long training pauses for a save in the background: ``ours`` and ``dcp``), and the ratios:
        ``ratio_torch_save``, ``ratio_dcp_save``, ``ratio_deepspeed_save`` (our speed over theirs), the same with
        ``load``, and ``stall_fraction_of_step``.

    Raises:
        UserError: the layout is impossible, or a rank failed and has printed why.
    """
    layout = plan_layout(load_config(config, overrides), ranks)
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.json"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "megamoe.bench.saving_ranks", str(config), str(folder), str(rounds), *overrides]
    processes = [subprocess.Popen(command, env=env) for env in local_environments(ranks).values()]
    try:
        while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
            time.sleep(0.05)
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        if failed:
            raise UserError(f"bench checkpoint: rank {failed[0]} failed with status {processes[failed[0]].poll()}")
    finally:
        for process in processes:
            process.kill()
    figures: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    results.unlink()
    for kind in ("save", "load"):
        seconds = figures[f"{kind}_seconds"]
        for peer in ("torch", "dcp", "deepspeed"):
            theirs = seconds[peer]
            figures[f"ratio_{peer}_{kind}"] = None if theirs is None else theirs / seconds["ours"]
    figures["stall_fraction_of_step"] = figures["stall_seconds"]["ours"] / figures["step_seconds"]
    return {"ranks": ranks, "layout": layout.describe(), **figures}


def as_table(figures: dict[str, Any]) -> str:
    """Format the figures as in docs/benchmarks.md."""
    size = figures["bytes"] / 1e6
    columns = [column for kind in ("save", "load") for column in (f"{kind} (s)", "MB/s", "ours over it")]
    lines = [
        f"{figures['ranks']} ranks ({figures['layout']}), {size:,.1f} MB, {figures['step_seconds']:.3f} s a step",
        "",
        table_head(["", *columns, "stall of a save beside training (s)"]),
    ]
    for name, label in (("ours", "ours"), ("torch", "torch.save"), ("dcp", "DCP"), ("deepspeed", "DeepSpeed")):
        cells = [label]
        for kind in ("save", "load"):
            seconds, ratio = figures[f"{kind}_seconds"][name], figures.get(f"ratio_{name}_{kind}")
            cells += ["-", "-"] if seconds is None else [f"{seconds:.3f}", f"{size / seconds:,.0f}"]
            cells.append("" if ratio is None else f"{ratio:.2f}")
        stall = figures["stall_seconds"].get(name)
        cells.append("" if stall is None else f"{stall:.4f}")
        lines.append(table_row(cells))
    lines += ["", f"stall_fraction_of_step {figures['stall_fraction_of_step']:.3f}"]
    return "\n".join(lines)
