"""A stand-in for the `megamoe` command: its verbs leave the files that the demo looks at, its training is 20 short naps
under the real launcher and the real metrics stream, with a "checkpoint" after every step."""

import json
import os
import sys
import time
from pathlib import Path

from launcher.local.launch import launch_local
from megamoe.config.launch import LaunchConfig
from megamoe.metrics import MetricsWriter

RUN, DATA, STEPS = Path("runs/demo"), Path("data/demo"), 20


def train() -> int:
    if "RANK" not in os.environ:
        command = [sys.executable, __file__]
        return launch_local(Path("configs/demo.yaml"), [], 4, "none", LaunchConfig(), RUN, command)
    if os.environ["RANK"] != "0":
        while not (RUN / "done").exists():
            time.sleep(0.05)
        return 0
    checkpoint = RUN / "checkpoint"
    done = int(checkpoint.read_text()) if checkpoint.exists() else 0
    with MetricsWriter(RUN, done if "auto" in sys.argv else None) as writer:
        for step in range(done + 1, STEPS + 1):
            time.sleep(0.3)
            writer.write({"step": step})
            checkpoint.write_text(str(step))
    (RUN / "done").touch()
    return 0


def evaluate() -> int:
    result = {"exact_match": float(os.environ["EXACT_MATCH"]), "splits": {"combinations": {"exact_match": 0.5}}}
    (RUN / "eval.json").write_text(json.dumps(result))
    return 0


def data() -> int:
    with Path("data-verbs").open("a") as file:
        print(*sys.argv[2:], file=file)
    DATA.mkdir(parents=True, exist_ok=True)
    (DATA / f"{sys.argv[2]}-made-this").touch()
    return 1 if os.environ.get("FAIL") == sys.argv[2] else 0


sys.exit({"train": train, "eval": evaluate, "data": data, "report": lambda: 0}[sys.argv[1]]())
