"""After the end of an attempt: who ended it, in words for people, and where the next one goes on from."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path

from launcher.workers.output import Terminal, error_line, last_lines, signal_name
from launcher.workers.rank_group import RankGroup
from megamoe.core.errors import UserError
from megamoe.core.exit_status import HUNG, REQUEST_IS_WRONG

PEER_GRACE = 5.0  # seconds; for ranks whose watchdogs end them one after the other, or that end a little after their time
LAST_WORDS = 2.0  # seconds; a rank whose peer is gone has nothing to save, but something to say


def latest_attempt(run_dir: Path) -> Path | None:
    """Log folder of the newest attempt at a run; None before the first."""
    attempts = [path for path in (run_dir / "logs").glob("attempt-*") if path.name[8:].isdigit()]
    return max(attempts, key=lambda path: int(path.name[8:]), default=None)


def new_attempt(run_dir: Path) -> Path:
    """Make the log folder of the next attempt.

    Raises:
        UserError: it cannot be made.
    """
    latest = latest_attempt(run_dir)
    folder = run_dir / "logs" / f"attempt-{int(latest.name[8:]) + 1 if latest else 1}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"run.dir {run_dir}: cannot be written ({error.strerror}); choose another run.dir") from error
    return folder


def last_words(ranks: RankGroup, status: int) -> Mapping[int, list[int]]:
    """Let the ranks that are left write where they are into their logs, since one ended with ``status``.

    Returns:
        After a hang the processes that are stopped, by rank, as :meth:`RankGroup.frozen` finds them.
    """
    frozen = ranks.frozen() if status == HUNG else {}
    ranks.signal(signal.SIGUSR2)
    ranks.wait(PEER_GRACE if status == HUNG else LAST_WORDS)
    return frozen


def explain(ranks: RankGroup, culprit: tuple[int, int], frozen: Mapping[int, list[int]], terminal: Terminal) -> None:
    """Say why the attempt has ended."""
    rank, status = culprit
    if status == REQUEST_IS_WRONG:
        _pass_on_error(ranks.logs, rank, terminal)
    elif status == HUNG:
        _explain_hang(ranks, frozen, terminal)
    else:
        lines = last_lines(ranks.logs[rank])
        said = "; it said nothing" if not lines else "; its last lines:"
        terminal.say("\n    ".join([f"rank {rank} {how(status)}, log {ranks.logs[rank]}{said}", *lines]))


def how(status: int) -> str:
    """``was killed by SIGKILL``, ``ended with status 1``."""
    return f"was killed by {signal_name(-status)}" if status < 0 else f"ended with status {status}"


def resume_after(resume: str, checkpoint: Path | None) -> str:
    """What the ranks resume from after this attempt.

    The newest checkpoint is right unless the user asked to start from a certain one: then the folder may hold later
    steps of the history that was left behind, and only ``checkpoint``, written since the launch, counts.
    """
    return "auto" if resume in ("auto", "none") else str(checkpoint or resume)


def _pass_on_error(logs: Mapping[int, Path], rank: int, terminal: Terminal) -> None:
    # What rank 0 said is on the terminal already; the others said the same, or rank 0 said nothing.
    if error_line(logs[0]) is None:
        line = error_line(logs[rank]) or f"megamoe: error: rank {rank} refused the request without a word, see {logs[rank]}"
        terminal.say(line.removeprefix("megamoe: "))


def _explain_hang(ranks: RankGroup, frozen: Mapping[int, list[int]], terminal: Terminal) -> None:
    """Name the processes that are stopped, if that is why, and what each rank that ended itself waited for."""
    for rank, processes in frozen.items():
        which = ", ".join("its main process" if pid == ranks.pids[rank] else f"its process {pid}" for pid in processes)
        terminal.say(f"rank {rank} is stopped ({which}; SIGSTOP, or a debugger): it takes part in nothing")
    for rank, status in ranks.ended().items():
        if status == HUNG:
            said = [line for line in last_lines(ranks.logs[rank]) if f"rank {rank} hangs" in line]
            line = said[-1].removeprefix("megamoe: ") if said else f"rank {rank} hangs"
            terminal.say(f"{line}, log {ranks.logs[rank]}")
