"""Trials of training under random faults, each of which has to end as if there had been none.

    python -m benchmarks.chaos [--trials 100] [--seed S] [--only SEED]... [--json FILE] [--page FILE] [--folder DIR]

Trial I of seed S has the seed 1000 S + I; S is today's date unless given, so each night has trials of its own. Results
are kept in DIR, and what is there already is not run again, unless the code has changed. Exit status 1 if a trial failed:
it is named, and `--only SEED` runs it again. `--dry-run` says what would happen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.chaos.plan import make_plan
from benchmarks.chaos.report import as_text, write_json, write_page
from benchmarks.chaos.trial import Result, run_trial
from benchmarks.chaos.truth import prepare
from tests.training import ROOT


def main() -> None:
    """Run the trials asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--seed", type=int, default=int(time.strftime("%Y%m%d")), help="default: the date, 20250131")
    parser.add_argument("--only", type=int, action="append", metavar="SEED", help="only the trial of this seed, again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write a page there, such as docs/chaos.md")
    parser.add_argument("--folder", type=Path, default=ROOT / "data" / "chaos", help="runs and results")
    parser.add_argument("--dry-run", action="store_true", help="only say what would happen")
    arguments = parser.parse_args()
    seeds = arguments.only or [1000 * arguments.seed + number for number in range(arguments.trials)]
    if arguments.dry_run:
        for seed in seeds:
            print(f"{seed}: {make_plan(seed).words()}")
        return
    # As Ctrl-C: nothing of the trial under way is left running or mounted.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = arguments.folder.absolute() / _digest()
    prepare(folder)
    results = []
    for number, seed in enumerate(seeds, 1):
        path = folder / "results" / f"{seed}.json"
        if path.exists() and not arguments.only:
            result = Result(**json.loads(path.read_text()))
        else:
            print(f"{number}/{len(seeds)}  {seed}: {make_plan(seed).words()}", flush=True)
            result = run_trial(folder, make_plan(seed))
            _keep(result, path)
            print("    " + (f"good, {result.seconds:.0f} s" if not result.problems else "FAILED"), flush=True)
            for line in (*result.problems, *result.notes):
                print(f"    {line}", flush=True)
        results.append(result)
        if arguments.json is not None:
            write_json(results, arguments.json)
        if arguments.page is not None:
            write_page(results, arguments.page)
    print(as_text(results))
    sys.exit(1 if any(result.problems for result in results) else 0)


def _keep(result: Result, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(result)))
    temporary.replace(path)


def _digest() -> str:
    """Of all code that a trial runs: results and undisturbed runs of other code say nothing."""
    digest = hashlib.blake2b(digest_size=6)
    for place in ("megamoe", "launcher", "benchmarks/chaos"):
        for path in sorted((ROOT / place).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    digest.update((ROOT / "tests/training.py").read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
