"""``megamoe demo``: the whole way from nothing to a report on a CPU, by the commands that a user would type.

On the way one training process is killed with SIGKILL, and the run has to end as if nothing had happened.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from megamoe.config import load_config
from megamoe.core.errors import UserError
from megamoe.core.run_folder import RunFolder
from megamoe.metrics.metrics_file import last_step, read_metrics

CONFIG = Path("configs/demo.yaml")
DATA = Path("data/demo")
PROCESSES = 4
SAMPLES = 80_000
HELD_OUT = 500
TARGET = 0.95  # exact match on held-out pictures
KILL_AT = 0.4  # of the steps: late enough to have a checkpoint behind, early enough to have much ahead
MARKER = "made-by-demo.json"


class CommandFailed(Exception):
    """A command of the demo did not end with status 0; it has said why itself."""


def run_demo(command: Sequence[str] = (sys.executable, "-m", "megamoe")) -> int:
    """Run the demo in the current folder, which has configs/demo.yaml; write data/demo and runs/demo.

    Shards of an earlier demo are used again. A run folder of an earlier demo is renamed, never deleted.

    Args:
        command: what to start in place of this Python's ``megamoe``.

    Returns:
        Exit status: 0 when at least 95% of the held-out captions are exactly right and every step was trained once.

    Raises:
        UserError: the folder is not that of the repository, or its config does not load.
    """
    if not CONFIG.exists():
        raise UserError(f"{CONFIG}: not in this folder ({Path.cwd()}); run the demo from the root of the repository")
    config = load_config(CONFIG)
    run, steps = config.run.folder, config.train.steps
    started = time.monotonic()
    before = signal.signal(signal.SIGTERM, _end_on_sigterm)
    try:
        _make_data(command)
        _set_aside(run)
        killed = _train(command, run, steps)
        _call(command, "eval", run, "--data", DATA / "validation")
        _call(command, "eval", run, "--data", DATA / "combinations", "--name", "combinations")
        _call(command, "report", run)
    except CommandFailed as failure:
        _tell(str(failure))
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return _summary(run, steps, killed, time.monotonic() - started)


def _make_data(command: Sequence[str]) -> None:
    train, held_out, combinations = DATA / "train", DATA / "validation", DATA / "combinations"
    verbs = [
        ("synth", DATA, "--samples", SAMPLES, "--seed", 0, "--level", 1, "--validation", HELD_OUT),
        ("tokenizer", train, DATA / "tokenizer", "--vocab-size", 384),
        ("index", train),
        ("index", held_out),
        ("index", combinations),
    ]
    commands = [shlex.join(map(str, verb)) for verb in verbs]
    marker = DATA / MARKER
    if marker.exists() and json.loads(marker.read_text()) == _made(commands):
        _tell(f"{DATA} has the shards of an earlier demo; they are used again")
        return
    for verb in verbs:
        _call(command, "data", *verb)
    marker.write_text(json.dumps(_made(commands), indent=1) + "\n")


def _made(commands: Sequence[str]) -> dict[str, object]:
    """What tells the demo's complete shards from half of them and from those of other commands."""
    paths = sorted(path for path in DATA.rglob("*") if path.is_file() and path.name != MARKER)
    return {"commands": commands, "bytes": {str(path.relative_to(DATA)): path.stat().st_size for path in paths}}


def _train(command: Sequence[str], run: Path, steps: int) -> str:
    """Train, with a kill on the way; returns what happened in words."""
    kill_at = max(1, round(steps * KILL_AT))
    _tell(f"around step {kill_at} this demo kills one of the {PROCESSES} workers; watch the run go on by itself")
    killed = "no worker was killed: the run was over too soon"
    with _running(command, "train", CONFIG, "--nproc", PROCESSES) as process:
        while process.poll() is None and _last_step(run) < kill_at:
            time.sleep(1)
        if process.poll() is None:
            rank, pid = _random_worker(run)
            step = _last_step(run)
            os.kill(pid, signal.SIGKILL)
            killed = f"worker {rank} was killed at step {step}"
            _tell(f"step {step}: killed worker {rank} (process {pid}) with SIGKILL, as a failing machine would")
    return killed


def _random_worker(run: Path) -> tuple[int, int]:
    attempt = RunFolder(run).latest_attempt()
    assert attempt is not None, "metrics are written, so ranks run"
    pids: dict[str, int] = json.loads(attempt.pids.read_text())
    rank = random.choice(sorted(pids))
    return int(rank), pids[rank]


def _last_step(run: Path) -> int:
    metrics = RunFolder(run).metrics
    return last_step(metrics) if metrics.exists() else 0


def _summary(run: Path, steps: int, killed: str, seconds: float) -> int:
    result = json.loads(RunFolder(run).results.read_text())
    combinations = result["splits"]["combinations"]["exact_match"]
    trained = [record["step"] for record in read_metrics(run)]
    each_once = trained == list(range(1, steps + 1))
    once = "each once" if each_once else f"NOT {steps:,} steps once each"
    reached = result["exact_match"] >= TARGET
    lines = [
        f"done in {seconds // 60:.0f} min {seconds % 60:.0f} s",
        f"  training      {len(trained):,} steps, {once}; {killed}",
        f"  exact match   {result['exact_match']:.1%} of the held-out captions "
        f"(target {TARGET:.0%}: {'reached' if reached else 'MISSED'})",
        f"  combinations  {combinations:.1%} where colour and shape never met in training (no target)",
        f"  report        {run / 'report.html'}",
    ]
    _tell("\n".join(lines))
    return 0 if reached and each_once else 1


def _set_aside(run: Path) -> None:
    """Rename a run folder that is in the way to the first free NAME-N; it may be hours of somebody's work."""
    if not run.exists():
        return
    number = 1
    while (aside := run.with_name(f"{run.name}-{number}")).exists():
        number += 1
    run.rename(aside)
    _tell(f"the run that was in {run} is now in {aside}; a fresh one starts")


def _call(command: Sequence[str], *arguments: object) -> None:
    with _running(command, *arguments):
        pass


@contextmanager
def _running(command: Sequence[str], *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """Start a ``megamoe`` command, showing it as one would type it; wait for its end, however the body ends."""
    words = [str(argument) for argument in arguments]
    typed = shlex.join(["megamoe", *words])
    print(f"\n$ {typed}", flush=True)
    process = subprocess.Popen([*command, *words])
    try:
        yield process
        status = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if status:
        raise CommandFailed(f"`{typed}` ended with status {status}")


def _tell(text: str) -> None:
    # stderr, and on a line of its own, since the progress bar of the training is there too.
    print(f"\ndemo: {text}", file=sys.stderr, flush=True)


def _end_on_sigterm(signum: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + signum)  # by way of the exception, so that the command that runs is ended too
