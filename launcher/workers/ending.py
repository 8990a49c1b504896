"""Wind up an attempt: explain to people who ended it, and find what the next one resumes from."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path

from launcher.workers.output import Terminal, last_lines
from launcher.workers.rank_group import RankGroup
from megamoe.core.errors import UserError
from megamoe.core.exit_status import HUNG, REQUEST_IS_WRONG, how_it_ended
from megamoe.core.rank_end import EndKind
from megamoe.core.run_folder import AttemptFolder, RunFolder

PEER_GRACE = 5.0  # seconds for ranks whose watchdogs end them one after the other, or that save a little late
LAST_WORDS = 2.0  # seconds for ranks to write their stacks; after the loss of a peer there is nothing to save


def new_attempt(run_dir: Path) -> AttemptFolder:
    """Make the log folder of the next attempt.

    Raises:
        UserError: it cannot be made.
    """
    run = RunFolder(run_dir)
    latest = run.latest_attempt()
    folder = run.attempt(latest.number + 1 if latest else 1)
    try:
        folder.path.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"run.dir {run_dir}: cannot be written ({error.strerror}); choose another run.dir") from error
    return folder


def last_words(ranks: RankGroup, status: int) -> Mapping[int, list[int]]:
    """Let the remaining ranks write where they are into their logs, since one ended with ``status``.

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
        _pass_on_error(ranks, rank, terminal)
    elif status == HUNG:
        _explain_hang(ranks, frozen, terminal)
    else:
        lines = last_lines(ranks.logs[rank])
        said = "; it said nothing" if not lines else "; its last lines:"
        terminal.say("\n    ".join([f"rank {rank} {how_it_ended(status)}, log {ranks.logs[rank]}{said}", *lines]))


def resume_after(resume: str, checkpoint: Path | None) -> str:
    """Return what the ranks resume from after this attempt.

    The newest checkpoint is right unless the user asked to start from a certain one: then the folder may hold later
    steps of the history that was left behind, and only ``checkpoint``, written since the launch, counts.
    """
    return "auto" if resume in ("auto", "none") else str(checkpoint or resume)


def _pass_on_error(ranks: RankGroup, rank: int, terminal: Terminal) -> None:
    """Say what is wrong with the request, unless rank 0 has: what it says is on the terminal already."""
    if _refusal(ranks, 0) is None:
        said = _refusal(ranks, rank) or f"rank {rank} refused the request without a word, see {ranks.logs[rank]}"
        terminal.say(f"error: {said}")


def _refusal(ranks: RankGroup, rank: int) -> str | None:
    end = ranks.end_of(rank)
    return end.message if end is not None and end.kind is EndKind.REQUEST_IS_WRONG and end.message else None


def _explain_hang(ranks: RankGroup, frozen: Mapping[int, list[int]], terminal: Terminal) -> None:
    """Name the processes that are stopped, if that is why, and what each rank that ended itself waited for."""
    for rank, processes in frozen.items():
        which = ", ".join("its main process" if pid == ranks.pids[rank] else f"its process {pid}" for pid in processes)
        terminal.say(f"rank {rank} is stopped ({which}; SIGSTOP, or a debugger): it takes part in nothing")
    for rank, status in ranks.ended().items():
        if status == HUNG:
            end = ranks.end_of(rank)
            said = end.message if end is not None and end.kind is EndKind.HUNG else f"rank {rank} hangs"
            terminal.say(f"{said}, log {ranks.logs[rank]}")
