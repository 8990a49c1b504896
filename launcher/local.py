"""Runs a training on this machine: N processes, restarted together from the last checkpoint when one dies or hangs."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.guard import Guard
from launcher.output import Terminal, error_line, last_lines, signal_name
from launcher.progress import Restarts, run_state
from launcher.ranks import POLL, Ranks, caught_signals
from launcher.stopped import AllStopped
from launcher.stopping import asked_to_stop, stop_ranks, stop_status
from megamoe.config.schema import LaunchConfig
from megamoe.errors import UserError
from megamoe.statuses import FAILED, HUNG, NO_PROGRESS, REQUEST_IS_WRONG

PEER_GRACE = 5.0  # seconds; a rank whose peer is gone has nothing to save, but something to say


def launch_local(
    config_path: Path,
    overrides: Sequence[str],
    nproc: int,
    resume: str,
    limits: LaunchConfig,
    run_dir: Path,
    command: Sequence[str] = (sys.executable, "-m", "megamoe"),
    watchdog_seconds: float = 0.0,
) -> int:
    """Run ``COMMAND train CONFIG --resume RESUME OVERRIDES`` as ``nproc`` ranks until all of them are done.

    When a rank dies or hangs, the others are ended and all start again with ``--resume auto``, as often as ``limits``
    allow. The logs of attempt A are in RUN/logs/attempt-A, with the process ids in pids.json. SIGINT, SIGTERM, SIGHUP
    and SIGUSR1 make the ranks save and stop; SIGINT on top of that ends them at once. No process is left behind,
    whatever ends this one.

    Args:
        config_path: config file, handed to the ranks as it is.
        overrides: ``KEY=VALUE`` settings, handed to the ranks as they are.
        nproc: number of ranks.
        resume: ``auto``, ``none`` or a checkpoint, for the first attempt.
        limits: how often to restart, and how long the ranks have to save when they are stopped.
        run_dir: the run's folder (``config.run.folder``).
        command: what to start in place of this Python's ``megamoe``.
        watchdog_seconds: all ranks stopped (SIGSTOP) for so long are a hang; 0: they may be for ever.

    Returns:
        Exit status: 0 all ranks are done; 2 a rank said that the request is wrong, its line is on stderr; 75 stopped,
        and nothing is lost; 128 + signal: stopped without a save; 77 restarts bring no progress; 1 a rank failed and no
        restart was left.

    Raises:
        UserError: the run's folder cannot be written.
    """
    terminal = Terminal()
    launched = time.time()
    restarts = Restarts(limits)
    with Guard() as guard, caught_signals() as caught:
        while True:
            arguments = [*command, "train", str(config_path), "--resume", resume, *overrides]
            with Ranks(arguments, nproc, _new_attempt(run_dir), terminal, guard) as ranks:
                stopped, hang = AllStopped(ranks.pids, watchdog_seconds), False
                while ranks.running() and not caught and not (hang := stopped.too_long(POLL)):
                    time.sleep(POLL)
                # A peer's watchdog says what hangs, if a peer is left that is not stopped.
                culprit = ranks.culprit() or ((0, HUNG) if hang else None)
                stop = bool(caught) or asked_to_stop(ranks)
                if stop:
                    by_themselves = stop_ranks(ranks, caught, limits.stop_grace + PEER_GRACE, terminal)
                elif culprit is not None:
                    frozen = ranks.frozen() if culprit[1] == HUNG else {}
                    ranks.signal(signal.SIGUSR2)  # where the others are now will be in their logs
                    ranks.wait(PEER_GRACE)
            state = run_state(run_dir, launched)
            resume = _resume_after(resume, state.checkpoint)
            if stop:
                status, words = stop_status(ranks.ended().values(), caught, by_themselves, state)
                if words:
                    typed = ["megamoe", "train", str(config_path), "--nproc", str(nproc), "--resume", resume, *overrides]
                    terminal.say(f"{words}; go on with: {shlex.join(typed)}")
                return status
            if culprit is None:
                return 0
            rank, status = culprit
            if status == REQUEST_IS_WRONG:
                _pass_on_error(ranks.logs, rank, terminal)
                return status
            if status == HUNG:
                _explain_hang(ranks, frozen, terminal)
            else:
                _explain(ranks.logs[rank], rank, status, terminal)
            restarts.note(state, f"rank {rank} {_how(status)}")
            if why := restarts.stuck():
                terminal.say(f"{why}; the logs are in {run_dir / 'logs'}")
                return NO_PROGRESS
            if not restarts.left():
                terminal.say(f"giving up after {restarts.count} restarts since the last checkpoint (launch.max_restarts)")
                return FAILED
            restarts.count += 1
            terminal.say(
                f"restart {restarts.count} of at most {limits.max_restarts} since the last checkpoint: "
                f"all {nproc} ranks with --resume {resume}"
            )


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


def _pass_on_error(logs: Sequence[Path], rank: int, terminal: Terminal) -> None:
    # What rank 0 said is on the terminal already; the others said the same, or rank 0 said nothing.
    if error_line(logs[0]) is None:
        line = error_line(logs[rank]) or f"megamoe: error: rank {rank} refused the request without a word, see {logs[rank]}"
        terminal.say(line.removeprefix("megamoe: "))


def _explain(log: Path, rank: int, status: int, terminal: Terminal) -> None:
    lines = last_lines(log)
    said = "; it said nothing" if not lines else "; its last lines:"
    terminal.say("\n    ".join([f"rank {rank} {_how(status)}, log {log}{said}", *lines]))


def _explain_hang(ranks: Ranks, frozen: dict[int, list[int]], terminal: Terminal) -> None:
    """Name the processes that are stopped, if that is why, and what each rank that ended itself waited for."""
    for rank, processes in frozen.items():
        which = ", ".join("its main process" if pid == ranks.pids[rank] else f"its process {pid}" for pid in processes)
        terminal.say(f"rank {rank} is stopped ({which}; SIGSTOP, or a debugger): it takes part in nothing")
    for rank, status in ranks.ended().items():
        if status == HUNG:
            said = [line for line in last_lines(ranks.logs[rank]) if f"rank {rank} hangs" in line]
            line = said[-1].removeprefix("megamoe: ") if said else f"rank {rank} hangs"
            terminal.say(f"{line}, log {ranks.logs[rank]}")


def _how(status: int) -> str:
    return f"was killed by {signal_name(-status)}" if status < 0 else f"ended with status {status}"


def _resume_after(resume: str, checkpoint: Path | None) -> str:
    """What the ranks resume from after this attempt.

    The newest checkpoint is right unless the user asked to start from a certain one: then the folder may hold later
    steps of the history that was left behind, and only ``checkpoint``, written since the launch, counts.
    """
    return "auto" if resume in ("auto", "none") else str(checkpoint or resume)
