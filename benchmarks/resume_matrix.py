"""Save a checkpoint under each layout, resume under every other one, and compare.

    python -m benchmarks.resume_matrix [--from LAYOUT]... [--to LAYOUT]... [--optimizer sgd|adamw]... [--folder DIR]

For each optimizer and layout a run of ten steps saves at step 5 (fp32, clipping that bites, auxiliary losses on). Every
pair then resumes from step 5 of one layout under the other, and is compared with the undisturbed run of one process: all
loss parts and the gradient norm to 1e-5 relative, and exactly which sample filled which slot. Under the layout that saved,
the numbers must equal those of its own undisturbed run, bit for bit. Finished pairs are kept in DIR and not run again.
Writes docs/resume-matrix.md; the exit status is 1 if a measured pair is out of bounds. The whole matrix takes 180 short
runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamoe.bench.tables import table_head, table_row
from tests.training import ROOT, audit, largest_difference, make_data, metrics, small_config, train, write_config

LIMIT = 1e-5
SAVED, LAST = 5, 10
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1x1x1": (1, ()),
    "pipeline 2": (2, ("parallel.pipeline=2",)),
    "expert 2": (2, ("parallel.expert=2",)),
    "pipeline 2 x expert 2": (4, ("parallel.pipeline=2", "parallel.expert=2")),
    "expert 4": (4, ("parallel.expert=4",)),
    "pipeline 4": (4, ("parallel.pipeline=4",)),
    "ZeRO-2": (2, ("parallel.zero=2",)),
    "ZeRO-3 x expert 2": (2, ("parallel.expert=2", "parallel.zero=3")),
    "pipeline 2 x data 2": (4, ("parallel.pipeline=2",)),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.5, "clip": 0.05, "weight_decay": 0.0},
    "adamw": {"name": "adamw", "lr": 3e-3, "clip": 0.5, "weight_decay": 0.1, "eps": 1e-5},
}


@dataclass(frozen=True)
class Pair:
    """A run that was saved under one layout and resumed under another.

    Attributes:
        difference: Largest relative difference to the undisturbed run of one process, and ``where``.
        same_samples: Whether every slot of every step got the same samples in the same order.
        exact: Under the layout that saved: whether all numbers are those of its undisturbed run; else None.
    """

    difference: float
    where: str
    same_samples: bool
    exact: bool | None

    @property
    def good(self) -> bool:
        """Return whether the pair is within bounds."""
        return self.difference <= LIMIT and self.same_samples and self.exact is not False


def prepare(folder: Path) -> None:
    """Make the data and the configs, unless they exist already."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, optim in OPTIMIZERS.items():
        settings = small_config(train={"steps": LAST}, optim=optim, checkpoint={"every": SAVED, "keep": LAST})
        write_config(folder, settings, f"{name}.yaml")
    if not (folder / "tokenizer.model").exists():  # it is made last
        shutil.rmtree(folder / "shards", ignore_errors=True)
        make_data(folder)


def measure(folder: Path, optimizer: str, saved: str, resumed: str) -> Pair:
    """Run what is missing of a pair and compare; keep the result in ``folder``/pairs."""
    path = folder / "pairs" / f"{optimizer}-{_name(saved)}-{_name(resumed)}.json"
    if path.exists():
        return Pair(**json.loads(path.read_text()))
    truth, source = (_undisturbed(folder, optimizer, layout) for layout in ("1x1x1", saved))
    run = folder / "runs" / path.stem
    shutil.rmtree(run, ignore_errors=True)  # of an interrupted measurement
    nproc, overrides = LAYOUTS[resumed]
    checkpoint = source / "checkpoints" / f"step-{SAVED:08d}"
    rows = train(folder, run.name, nproc, overrides, resume=str(checkpoint), config=f"{optimizer}.yaml")
    difference, where = largest_difference(metrics(truth)[SAVED:], rows)
    samples = [row for row in audit(truth) if row[0] > SAVED]
    exact = None
    if saved == resumed:
        exact = largest_difference(metrics(source)[SAVED:], rows)[0] == 0.0
    pair = Pair(difference, where, audit(run) == samples and bool(samples), exact)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(pair)))
    temporary.rename(path)
    shutil.rmtree(run)  # its checkpoints would fill the disk
    return pair


def write_page(folder: Path, page: Path) -> None:
    """Write the table of each optimizer from all pairs measured so far."""
    lines = [
        "# Saved under one layout, resumed under another",
        "",
        f"Written by `python -m benchmarks.resume_matrix`. Each run saves at step {SAVED} under the layout of its row",
        f"and resumes, to step {LAST}, under the layout of its column. The figure is the largest relative difference",
        "of any loss part or of the gradient norm, at any step, from an undisturbed run of one process: fp32 on",
        f"the CPU, clipping that takes effect at every step, auxiliary losses on; up to {LIMIT:g} is good. `=`: every",
        "number is bit for bit that of the undisturbed run under the same layout. **Bold**: out of bounds, or",
        "other samples. `·`: not run.",
    ]
    for optimizer in OPTIMIZERS:
        lines += ["", f"## {optimizer}", "", table_head(["saved \\ resumed", *LAYOUTS], numbers=True)]
        for saved in LAYOUTS:
            cells = [_cell(folder / "pairs" / f"{optimizer}-{_name(saved)}-{_name(to)}.json") for to in LAYOUTS]
            lines.append(table_row([saved, *cells]))
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Measure the selected pairs and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice: dict[str, Any] = {"action": "append", "choices": list(LAYOUTS)}
    parser.add_argument("--from", dest="saved", **choice, help="layouts that save (default: all)")
    parser.add_argument("--to", dest="resumed", **choice, help="layouts that go on (default: all)")
    parser.add_argument("--optimizer", action="append", choices=list(OPTIMIZERS), help="default: both")
    parser.add_argument("--folder", type=Path, default=ROOT / "data" / "resume-matrix", help="runs and results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "resume-matrix.md")
    arguments = parser.parse_args()
    prepare(arguments.folder)
    bad = 0
    for optimizer in arguments.optimizer or OPTIMIZERS:
        for saved, resumed in _pairs(arguments.saved or LAYOUTS, arguments.resumed or LAYOUTS):
            pair = measure(arguments.folder, optimizer, saved, resumed)
            bad += not pair.good
            verdict = (
                "" if pair.good else f"  OUT OF BOUNDS, samples {'same' if pair.same_samples else 'differ'}, {pair.where}"
            )
            exact = "  exact" if pair.exact else ""
            print(f"{optimizer:<6} {saved:>22} -> {resumed:<22} {pair.difference:.1e}{exact}{verdict}", flush=True)
            write_page(arguments.folder, arguments.page)
    sys.exit(1 if bad else 0)


def _undisturbed(folder: Path, optimizer: str, layout: str) -> Path:
    """Return the run of ten steps under a layout, with its checkpoint of step 5; train it if it is missing."""
    run = folder / "runs" / f"{optimizer}-{_name(layout)}"
    if not (run / "checkpoints" / f"step-{LAST:08d}").exists():
        shutil.rmtree(run, ignore_errors=True)
        nproc, overrides = LAYOUTS[layout]
        train(folder, run.name, nproc, overrides, config=f"{optimizer}.yaml")
    return run


def _pairs(saved: Iterable[str], resumed: Iterable[str]) -> list[tuple[str, str]]:
    targets = list(resumed)
    return [(one, other) for one in saved for other in targets]


def _cell(path: Path) -> str:
    if not path.exists():
        return "·"
    pair = Pair(**json.loads(path.read_text()))
    text = f"{pair.difference:.1e}{' =' if pair.exact else ''}"
    return text if pair.good else f"**{text}**"


def _name(layout: str) -> str:
    return layout.replace(" ", "")


if __name__ == "__main__":
    main()
