"""What the trials gave: a table for people, a page, JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.chaos.plan import KINDS
from benchmarks.chaos.trial import Result

HEADER = ("kind", "times", "trials", "failed", "no new step: median s", "worst s", "extra s a fault")


def table(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Rows of strings, one for each kind and one for all; the first one is the header."""
    rows: list[tuple[str, ...]] = [HEADER]
    for kind in (*KINDS, None):
        with_it = [result for result in results if kind is None or kind in result.kinds]
        lost = [
            seconds
            for result in with_it
            for name, seconds in zip(result.kinds, result.lost, strict=False)
            if kind in (None, name)
        ]
        extra = [(result.seconds - result.undisturbed) / len(result.kinds) for result in with_it if not result.problems]
        times = sum(len(result.kinds) if kind is None else result.kinds.count(kind) for result in with_it)
        rows.append(
            (
                kind or "all",
                str(times),
                str(len(with_it)),
                str(sum(bool(result.problems) for result in with_it)),
                f"{statistics.median(lost):.1f}" if lost else "",
                f"{max(lost):.1f}" if lost else "",
                f"{statistics.mean(extra):.1f}" if extra else "",
            )
        )
    return rows


def as_text(results: Sequence[Result]) -> str:
    """The table for a terminal, and a line for each trial that failed."""
    rows = table(results)
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [
        "  ".join(
            cell.ljust(width) if not number else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    for result in results:
        if result.problems:
            lines.append(f"FAILED: seed {result.seed}: {result.problems[0]}")
            lines.append(f"    again: python -m benchmarks.chaos --only {result.seed}")
    return "\n".join([*lines, _counts(results)])


def write_json(results: Sequence[Result], path: Path) -> None:
    """All results, whole."""
    path.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")


def write_page(results: Sequence[Result], page: Path) -> None:
    """docs/chaos.md."""
    head, *rows = table(results)
    lines = [
        "# Chaos: random faults, and a run that ends as if there had been none",
        "",
        "Written by `make chaos` (`python -m benchmarks.chaos`). A trial is made from its seed: a layout, and one to",
        "three faults at random moments, some of them within a save or while the ranks start after the previous",
        "fault. It runs with real processes and real signals, and is launched again, in the same or in a smaller",
        "layout, when a fault has ended the launcher. A trial is good if each step is in metrics.jsonl once; if all",
        "numbers are bit for bit those of the undisturbed run while the layout is the same, and within 1e-5 relative",
        "(fp32) in a smaller one; if the audit and the lost samples are the same; if all checkpoints are whole in the",
        "end, and damaged ones were named; and if no process, no shared memory and no half-written file is left. A",
        "lasting NaN is compared with an undisturbed run that skips that step.",
        "",
        "Steps and syncs are slowed down in the trials (0.1 s and 0.05 s), so that a moment within them can be hit.",
        '"No new step" is the longest time after the fault without a step that was not recorded before, up to the',
        'next fault. "Extra" is wall time beyond that of the undisturbed run in the first layout, divided among the',
        "faults of the trial. Frozen processes are noticed after `train.watchdog_seconds`, which is 6 in these",
        "trials. Much of the rest is the start of Python and its imports.",
        "",
        f"| {' | '.join(head)} |",
        "| --- |" + " ---: |" * (len(head) - 1),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        _counts(results),
    ]
    failed = [result for result in results if result.problems]
    if failed:
        lines += ["", "## Failed", ""]
        lines += [f"- `--only {result.seed}`: {result.plan}: {result.problems[0].splitlines()[0]}" for result in failed]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _counts(results: Sequence[Result]) -> str:
    smaller = sum(len(set(result.layouts)) > 1 for result in results)
    return (
        f"{len(results)} trials with {sum(len(result.kinds) for result in results)} faults, "
        f"{sum(result.in_saves for result in results)} of them within a save; {smaller} trials continued in a smaller "
        f"layout; ranks were started {sum(result.attempts for result in results)} times; "
        f"{sum(bool(result.problems) for result in results)} trials failed."
    )
