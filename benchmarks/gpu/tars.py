"""configs/1b.yaml from real tar shards with worker processes, by the command that users give: how long do steps wait?"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time

from benchmarks.gpu.context import ROOT, Context
from benchmarks.gpu.machine import peak_flops
from benchmarks.gpu.model_1b import TINY

ROWS, STEPS, WARM_UP = 16, 12, 3


def measure(context: Context) -> None:
    """Record the median step after the first three, and what of it was waiting for data."""
    rows = 1 if context.tiny else ROWS
    run = context.scratch / "run"
    command = [
        sys.executable, "-m", "megamoe", "train", str(ROOT / "configs/1b.yaml"), "--nproc", "1", f"run.dir={run}",
        f"data.train={context.data}/train", f"data.tokenizer={context.data}/tokenizer.model", "parallel.pipeline=1",
        "parallel.expert=1", f"train.micro_batch={rows}", f"train.global_batch={2 * rows}", "metrics.tensorboard=false",
        "checkpoint.every=1000000", "optim.warmup=10", *(TINY if context.tiny else ()),
    ]  # fmt: skip
    with (context.scratch / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=context.scratch, env=context.environment(), stdout=log, stderr=subprocess.STDOUT
        )
        path = run / "metrics.jsonl"
        try:
            started = time.perf_counter()
            lines: list[str] = []
            while len(lines) < STEPS and process.poll() is None:
                time.sleep(0.1)
                lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
                if lines and "seconds to the first step" not in context.figures:
                    context.record("seconds to the first step", time.perf_counter() - started)
            if process.poll() is not None:
                sys.exit((context.scratch / "log").read_text(errors="replace")[-3000:])
        finally:
            process.send_signal(signal.SIGKILL)  # a last checkpoint would take longer than all the rest
            process.wait()
    steps = [json.loads(line) for line in lines[WARM_UP:STEPS]]
    middle = {key: statistics.median(step[key] for step in steps) for key in ("step_seconds", "data_seconds")}
    middle["tokens_per_second"] = statistics.median(step["tokens_per_second"] for step in steps)
    flops = statistics.median(step["model_flops_per_second"] for step in steps)
    if context.cuda:
        import torch

        middle["mfu"] = flops / (peak_flops(torch.cuda.get_device_name()) or float("nan"))
    context.record("steps", middle | {"model_flops_per_second": flops, "losses": [step["lm_loss"] for step in steps]})
    context.record("data_share", middle["data_seconds"] / middle["step_seconds"])
