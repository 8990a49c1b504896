"""Measure what each choice of ``parallel.recompute`` saves and costs: peak memory and step time, beside the prediction.

    python benchmarks/recompute.py [--nproc 2] [--steps 6] [KEY=VALUE ...]

Trains a model of about 90M parameters (configs/1b.yaml, narrower and shallower) on generated pictures, once per choice,
and prints a Markdown table. Step times exclude the first step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.command import ROOT, run_megamoe
from megamoe.bench.tables import table_head, table_row

CHOICES = ("none", "block", "offload")
SMALLER = (
    "model.vision.width=384", "model.vision.depth=6", "model.vision.heads=6", "model.vision.mlp_width=1536",
    "model.vision.expert_width=384", "model.decoder.vocab_size=1024", "model.decoder.width=384", "model.decoder.depth=8",
    "model.decoder.heads=6", "model.decoder.kv_heads=2", "model.decoder.mlp_width=1536",
    "model.decoder.expert_width=384", "model.moe.experts=8", "data.sequence_length=1024", "data.images_per_sequence=4",
    "data.workers=0", "train.global_batch=4", "train.micro_batch=1", "parallel.pipeline=2", "parallel.expert=1",
    "metrics.tensorboard=false", "checkpoint.every=1000000", "data.train=shards/train", "data.tokenizer=tokenizer.model",
)  # fmt: skip


def main() -> None:
    """Run the three choices and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_megamoe(
            folder, "data", "synth", "shards", "--samples", "256", "--seed", "0", "--level", "3", "--image-size", "224"
        )
        run_megamoe(folder, "data", "tokenizer", "shards/train", "tokenizer", "--vocab-size", "400")
        print(table_head(["recompute", "peak of each rank (GB)", "predicted (GB)", "step (s)", "over none"]))
        first = None
        for choice in CHOICES:
            settings = [*SMALLER, f"train.steps={arguments.steps}", *arguments.overrides]
            settings += [f"run.name={choice}", f"parallel.recompute={choice}"]
            run_megamoe(folder, "train", str(ROOT / "configs/1b.yaml"), "--nproc", str(arguments.nproc), *settings)
            run = folder / "runs" / choice
            seconds = [json.loads(line)["step_seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
            step = statistics.median(seconds)
            first = first or step
            ranks = json.loads((run / "memory.json").read_text())
            peak, predicted = (", ".join(f"{rank[key] / 1e9:.2f}" for rank in ranks) for key in ("peak", "predicted"))
            print(table_row([choice, peak, predicted, f"{step:.2f}", f"{step / first:.2f}"]), flush=True)


if __name__ == "__main__":
    main()
