"""A spike, NaN and a hang of the device, once each, in real runs of configs/demo.yaml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import ROOT, Context
from megamoe.core.exit_status import HUNG

FAULTS = ROOT / "tests/faults"


def measure(context: Context) -> None:
    """Record what the run made of each fault, and whether it is what a run on a CPU makes of it."""
    # The third computation is NaN, and taken once more. So is the sixth, step 5; again NaN, the step is skipped.
    status, log, rows = _run(context, "nan", [str(FAULTS / "poisoned.py"), "3,6,7"], steps=6)
    found = [(row["recomputed"], row["skipped"]) for row in rows]
    good = status == 0 and found == [(0, 0), (0, 0), (1, 0), (1, 0), (2, 1), (2, 1)]
    context.record("NaN", {"status": status, "recomputed and skipped": found, "holds": good, **_end(good, log)})

    settings = ["train.spike_window=8"]
    status, log, rows = _run(context, "spike", [str(FAULTS / "spiky.py"), "10"], 11, *settings)
    spikes = [row["spikes"] for row in rows]
    spike = status == 0 and spikes == [0] * 9 + [1, 1]
    context.record("spike", {"status": status, "spikes": spikes, "holds": spike, **_end(spike, log)})

    status, log, rows = _run(context, "hang", ["-m", "benchmarks.gpu.hang"], 5, "train.watchdog_seconds=4")
    hang = status == HUNG and len(rows) == 2 and "rank 0 hangs in step 3" in log
    context.record("hang of the device", {"status": status, "steps done": len(rows), "holds": hang, **_end(hang, log)})
    context.record("holds", good and spike and hang)


def _run(
    context: Context, name: str, script: list[str], steps: int, *overrides: str
) -> tuple[int, str, list[dict[str, Any]]]:
    """Be torchrun for one rank; returns its status, what it said, and its metrics."""
    run = context.scratch / name
    command = [
        sys.executable, *script, "train", str(ROOT / "configs/demo.yaml"), f"run.dir={run}", "parallel.pipeline=1",
        "parallel.expert=1", f"data.train={context.data}/train", f"data.tokenizer={context.data}/tokenizer.model",
        "model.decoder.vocab_size=512", f"train.steps={steps}", "metrics.tensorboard=false", "model.attention=sdpa",
        "data.workers=0", *overrides,
    ]  # fmt: skip
    environment = {**context.environment(), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    environment |= {key: os.environ[key] for key in ("MASTER_ADDR", "MASTER_PORT")}
    done = subprocess.run(
        command, cwd=context.scratch, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    path = Path(run / "metrics.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return done.returncode, done.stdout, [json.loads(line) for line in lines]


def _end(good: bool, log: str) -> dict[str, str]:
    return {} if good else {"said": log[-1500:]}
