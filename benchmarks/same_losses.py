"""Compare two revisions: every loss, norm and sample id of every step, on three layouts.

    python -m benchmarks.same_losses REVISION [OTHER] [--steps N] [--config CONFIG] [KEY=VALUE ...]

REVISION and OTHER are git revisions; OTHER defaults to the working tree. Both train on the same generated shards, on one
process, on pipeline 2 x expert 2 and on ZeRO-3 x expert 2. Then both resume from the checkpoints of REVISION. A change that
must not change numbers shows "identical" on every line; the exit status is 1 if a line differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.command import ROOT, run_megamoe

LAYOUTS = {
    "one process": (1, ("parallel.pipeline=1", "parallel.expert=1")),
    "pipeline 2 x expert 2": (4, ("parallel.pipeline=2", "parallel.expert=2")),
    "ZeRO-3 x expert 2": (2, ("parallel.pipeline=1", "parallel.expert=2", "parallel.zero=3")),
}
SETTINGS = (
    "data.train=shards/train", "data.tokenizer=tokenizer.model", "data.audit=true", "data.workers=1",
    "model.decoder.vocab_size=512", "train.global_batch=16", "metrics.tensorboard=false",
    # Clipping that bites at each step: a wrong scale of gradients shows at once under SGD.
    "optim.name=sgd", "optim.lr=0.5", "optim.clip=0.05", "optim.warmup=0",
)  # fmt: skip
EXACT = ("step", "loss", "lm_loss", "aux_loss", "z_loss", "grad_norm", "lr", "tokens", "samples", "load")


def main() -> None:
    """Train both revisions, compare them, and print two lines per layout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision")
    parser.add_argument("other", nargs="?")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/demo.yaml")
    arguments, overrides = parser.parse_known_args()
    if arguments.other is not None and "=" in arguments.other:
        overrides, arguments.other = [arguments.other, *overrides], None
    same = True
    with _checkout(arguments.revision) as one, _checkout(arguments.other) as other, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synth = ("data", "synth", "shards", "--samples", "600", "--seed", "3", "--level", "3", "--image-size", "64")
        run_megamoe(folder, *synth, "--shard-size", "70", root=one)
        run_megamoe(folder, "data", "tokenizer", "shards/train", "tokenizer", "--vocab-size", "400", root=one)
        for number, (layout, (nproc, settings)) in enumerate(LAYOUTS.items()):
            common = [str(arguments.config), "--nproc", str(nproc), *SETTINGS, *settings, *overrides]
            for root, run, steps, resume in (
                (one, f"one-{number}", arguments.steps, "none"),
                (other, f"other-{number}", arguments.steps, "none"),
                (one, f"one-on-{number}", arguments.steps + 3, f"runs/one-{number}"),
                (other, f"other-on-{number}", arguments.steps + 3, f"runs/one-{number}"),
            ):
                settings_of_run = ("--resume", resume, f"run.name={run}", f"train.steps={steps}")
                run_megamoe(folder, "train", *common, *settings_of_run, root=root)
            for what, first, second in (
                (f"{layout}, {arguments.steps} steps", f"one-{number}", f"other-{number}"),
                (f"{layout}, three more steps from the first one's checkpoint", f"one-on-{number}", f"other-on-{number}"),
            ):
                difference = _difference(folder / "runs" / first, folder / "runs" / second)
                same &= difference is None
                print(f"{what}: {difference or 'identical'}", flush=True)
    sys.exit(0 if same else 1)


@contextmanager
def _checkout(revision: str | None) -> Iterator[Path]:
    """Check a revision out for as long as it is needed; None: the working tree."""
    if revision is None:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkout"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", folder, revision], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", folder], check=True)


def _difference(one: Path, other: Path) -> str | None:
    """Return the first difference of two runs; None if there is none."""
    rows, others = _lines(one / "metrics.jsonl"), _lines(other / "metrics.jsonl")
    if len(rows) != len(others):
        return f"{len(rows)} and {len(others)} steps"
    for row, another in zip(rows, others, strict=True):
        for key in EXACT:
            if row[key] != another[key]:
                return f"step {row['step']}: {key} is {row[key]} and {another[key]}"
    audits = [{path.name: _lines(path) for path in sorted((run / "audit").glob("*.jsonl"))} for run in (one, other)]
    return None if audits[0] == audits[1] and audits[0] else "the samples differ"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
