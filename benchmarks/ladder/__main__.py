"""One run on a real SLURM under random failures, which has to end as if there had been none.

    python -m benchmarks.ladder [--failures 10] [--seed S] [--json FILE] [--dry-run]

Says how long each kind of failure stops the run: from the fault to the first new step, and how much of that SLURM takes,
which on a cluster is another number. Which failures come, in what order and where, follows from the seed (by default the
date). Exit status 1 if the run does not end as the undisturbed one, or one of them is missing. Needs what slurm/testbed
needs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.ladder.faults import WATCHDOG, Faults, Recovered, draw
from slurm.bed import why_not
from tests.slurm.jobs import BedWithJobs
from tests.slurm.launched import LaunchedRun
from tests.training import audit, largest_difference, make_data, metrics, small_config, train, write_config

PACE = 0.5  # seconds that a step takes longer, so that the run lasts as long as there are failures to come
# Steps of the run for each failure. Not more than needed: another layout rounds in another way, which after a hundred
# steps or two makes a token choose another expert, and no number is within 1e-5 from there on.
STEPS_EACH = 6
HEADER = ("failure", "recovery", "times", "to a new step: median s", "worst s", "without SLURM: median s", "worst s")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--failures", type=int, default=10, help="how many (default: 10)")
    parser.add_argument("--seed", type=int, default=int(time.strftime("%Y%m%d")), help="default: the date, 20250131")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--dry-run", action="store_true", help="only say what would happen")
    arguments = parser.parse_args()
    faults = draw(arguments.seed, arguments.failures)
    if arguments.dry_run:
        print(*faults, sep="\n")
        return
    if reason := why_not():
        sys.exit(f"no SLURM test bed here: {reason}")
    signal.signal(signal.SIGTERM, _end)
    with tempfile.TemporaryDirectory(prefix="ladder-") as place:
        found, problems = run_under(Path(place), faults, arguments.seed)
    print(as_text(found))
    for problem in problems:
        print(f"FAILED: {problem}; again: --seed {arguments.seed}")
    if arguments.json is not None:
        machine = {"cores": os.cpu_count(), "load": os.getloadavg()}
        content = {"seed": arguments.seed, "machine": machine, "problems": problems}
        recovered = [asdict(each) for each in found]
        arguments.json.write_text(json.dumps(content | {"recoveries": recovered}, indent=1) + "\n")
    sys.exit(1 if problems else 0)


def run_under(place: Path, faults: Sequence[str], seed: int) -> tuple[list[Recovered], list[str]]:
    """Train under these faults in ``place``; the recoveries, and what was not as it has to be."""
    make_data(place)
    launch = {"nodes": 2, "spares": 1, "max_restarts": len(faults) + 3}
    training = {"steps": STEPS_EACH * len(faults), "watchdog_seconds": WATCHDOG}
    write_config(place, small_config(train=training, checkpoint={"every": 5}, launch=launch))
    undisturbed = train(place, "undisturbed", nproc=2)
    bed = BedWithJobs(place / "bed")
    bed.up(nodes=3)
    found: list[Recovered] = []
    try:
        run = LaunchedRun(bed, place, "ladder", pace=PACE)
        rng = random.Random(seed)
        struck = Faults(run, rng, PACE)
        run.until_goes_on("start")
        for number, fault in enumerate(faults, 1):
            time.sleep(rng.uniform(0, 3))
            recovered = struck.strike(fault)
            for each in recovered:
                print(f"{number}/{len(faults)}  {_told(each)}", flush=True)
            found += recovered
        run.end()
        difference, where = largest_difference(undisturbed, metrics(run.run))
        problems = [] if difference <= 1e-5 else [where]
        if audit(run.run) != audit(place / "runs/undisturbed"):
            problems.append("the audit has other samples than that of the undisturbed run")
    except AssertionError as missed:
        problems = [str(missed)]
    finally:
        bed.down()
    return found, problems


def as_text(found: Sequence[Recovered]) -> str:
    """A table: a row for each failure and the recovery from it."""
    rows: list[tuple[str, ...]] = [HEADER]
    for fault, kind in dict.fromkeys((each.fault, each.kind) for each in found):
        of_kind = [each for each in found if (each.fault, each.kind) == (fault, kind)]
        times = [each.seconds for each in of_kind], [each.seconds - each.cluster for each in of_kind]
        numbers = [f"{what(values):.1f}" for values in times for what in (statistics.median, max)]
        rows.append((fault, kind, str(len(of_kind)), *numbers))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    left = ["  ".join(cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)) for row in rows]
    right = ["  ".join(cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)) for row in rows]
    return "\n".join("  ".join(parts) for parts in zip(left, right, strict=True))


def _end(*_: object) -> None:
    # The bed is taken down, and a second signal does not leave half of it: `timeout` passes on what its group gets.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)


def _told(each: Recovered) -> str:
    took = f"{each.seconds:.1f} s, {each.seconds - each.cluster:.1f} s without SLURM"
    return f"{each.fault} -> {each.kind}: step {each.step} after {took}"


if __name__ == "__main__":
    main()
