"""Runs a training on this machine: N processes, restarted together from the last checkpoint when one dies."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.guard import Guard
from launcher.output import Terminal, error_line, last_lines
from launcher.ranks import POLL, REQUEST_IS_WRONG, Ranks, caught_signals
from megamoe.errors import UserError

PEER_GRACE = 5.0  # seconds; a rank whose peer is gone has nothing to save
STOP_GRACE = 60.0  # seconds; a rank that was asked to stop may be writing a checkpoint


def launch_local(
    config_path: Path,
    overrides: Sequence[str],
    nproc: int,
    resume: str,
    max_restarts: int,
    run_dir: Path,
    command: Sequence[str] = (sys.executable, "-m", "megamoe"),
) -> int:
    """Run ``COMMAND train CONFIG --resume RESUME OVERRIDES`` as ``nproc`` ranks until all of them are done.

    When a rank dies, the others are ended and all start again with ``--resume auto``, at most ``max_restarts`` times.
    The logs of attempt A are in RUN/logs/attempt-A, with the process ids in pids.json. SIGINT, SIGTERM and SIGHUP go
    to the ranks as SIGTERM; a second one ends them at once. No process is left behind, whatever ends this one.

    Args:
        config_path: config file, handed to the ranks as it is.
        overrides: ``KEY=VALUE`` settings, handed to the ranks as they are.
        nproc: number of ranks.
        resume: ``auto``, ``none`` or a checkpoint, for the first attempt.
        max_restarts: restarts before giving up.
        run_dir: the run's folder (``config.run.folder``).
        command: what to start in place of this Python's ``megamoe``.

    Returns:
        Exit status: 0 all ranks are done; 2 a rank said that the request is wrong, its line is on stderr; 128 + signal
        when stopped by one; 1 a rank failed and no restart was left.

    Raises:
        UserError: the run's folder cannot be written.
    """
    terminal = Terminal()
    launched = time.time()
    restarts = 0
    with Guard() as guard, caught_signals() as caught:
        while True:
            arguments = [*command, "train", str(config_path), "--resume", resume, *overrides]
            with Ranks(arguments, nproc, _new_attempt(run_dir), terminal, guard) as ranks:
                while ranks.running() and not caught:
                    time.sleep(POLL)
                if caught:
                    _stop(ranks, caught, terminal)
                    return 128 + caught[0]
                culprit = ranks.culprit()
                if culprit is not None:
                    ranks.signal(signal.SIGTERM)
                    ranks.wait(PEER_GRACE)
            if culprit is None:
                return 0
            rank, status = culprit
            if status == REQUEST_IS_WRONG:
                _pass_on_error(ranks.logs, rank, terminal)
                return status
            _explain(ranks.logs[rank], rank, status, terminal)
            if restarts == max_restarts:
                terminal.say(f"giving up after {restarts} restarts (launch.max_restarts)")
                return 1
            restarts += 1
            resume = _resume_after(resume, run_dir, launched)
            terminal.say(f"restart {restarts} of at most {max_restarts}: all {nproc} ranks with --resume {resume}")


def latest_attempt(run_dir: Path) -> Path | None:
    """Log folder of the newest attempt at a run; None before the first."""
    attempts = [path for path in (run_dir / "logs").glob("attempt-*") if path.name[8:].isdigit()]
    return max(attempts, key=lambda path: int(path.name[8:]), default=None)


def _new_attempt(run_dir: Path) -> Path:
    latest = latest_attempt(run_dir)
    folder = run_dir / "logs" / f"attempt-{int(latest.name[8:]) + 1 if latest else 1}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"run.dir {run_dir}: cannot be written ({error.strerror}); choose another run.dir") from error
    return folder


def _stop(ranks: Ranks, caught: list[int], terminal: Terminal) -> None:
    terminal.say(f"{_signal_name(caught[0])}: stopping the ranks; once more ends them at once")
    ranks.signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_GRACE
    while len(caught) == 1 and time.monotonic() < deadline and not ranks.wait(POLL):
        pass


def _pass_on_error(logs: Sequence[Path], rank: int, terminal: Terminal) -> None:
    # What rank 0 said is on the terminal already; the others said the same, or rank 0 said nothing.
    if error_line(logs[0]) is None:
        line = error_line(logs[rank]) or f"megamoe: error: rank {rank} refused the request without a word, see {logs[rank]}"
        terminal.say(line.removeprefix("megamoe: "))


def _explain(log: Path, rank: int, status: int, terminal: Terminal) -> None:
    how = f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
    lines = last_lines(log)
    said = "; it said nothing" if not lines else "; its last lines:"
    terminal.say("\n    ".join([f"rank {rank} {how}, log {log}{said}", *lines]))


def _resume_after(resume: str, run_dir: Path, launched: float) -> str:
    """What the ranks resume from after a restart.

    The newest checkpoint is right unless the user asked to start from a certain one: then the folder may hold later
    steps of the history that was left behind, and only checkpoints written since count.
    """
    if resume in ("auto", "none"):
        return "auto"
    written = [
        path
        for path in (run_dir / "checkpoints").glob("step-*")
        if re.fullmatch(r"step-\d+", path.name) and path.stat().st_mtime >= launched
    ]
    return str(max(written, key=lambda path: int(path.name[5:]))) if written else resume


def _signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:  # the real-time signals have no names
        return f"signal {signum}"
