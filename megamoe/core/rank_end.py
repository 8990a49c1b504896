"""How a rank ended, as the rank itself reports it: one small JSON file beside its log.

The launcher names the file in the environment of each rank. The rank writes it as the last thing before it ends. A rank
that is killed, or that was started by another launcher (torchrun, srun, mpirun), leaves no report. Launchers act on the
exit status and on this report, never on the text of a log.
"""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from megamoe.core.exit_status import HUNG, REQUEST_IS_WRONG, STOP_FAILED, STOPPED, STOPPED_TWICE

END_VARIABLE = "MEGAMOE_RANK_END"
"""Environment variable that names the file for the report of a rank."""


class EndKind(StrEnum):
    """Why a rank ended."""

    DONE = "done"
    REQUEST_IS_WRONG = "request_is_wrong"
    STOPPED = "stopped"
    HUNG = "hung"
    STOP_FAILED = "stop_failed"
    INTERRUPTED = "interrupted"
    PORT_TAKEN = "port_taken"
    FAILED = "failed"


_KINDS = {
    0: EndKind.DONE,
    REQUEST_IS_WRONG: EndKind.REQUEST_IS_WRONG,
    STOPPED: EndKind.STOPPED,
    HUNG: EndKind.HUNG,
    STOP_FAILED: EndKind.STOP_FAILED,
    STOPPED_TWICE: EndKind.INTERRUPTED,
}


@dataclass(frozen=True)
class RankEnd:
    """The report of one rank.

    Attributes:
        kind: why it ended.
        status: its exit status.
        message: one line for people; empty when there is nothing to say.
        pid: its process id, which tells this report from one of another process.
        phase: what the training thread was doing, where that is known.
        step: the step under way, where that is known.
    """

    kind: EndKind
    status: int
    message: str
    pid: int
    phase: str | None = None
    step: int | None = None


def report_end(
    status: int,
    message: str = "",
    *,
    kind: EndKind | None = None,
    phase: str | None = None,
    step: int | None = None,
) -> None:
    """Report that this process is about to end with ``status``; do nothing when no launcher asked for a report.

    Args:
        status: exit status.
        message: one line for people.
        kind: why, when the status alone does not say it.
        phase: what the training thread is doing.
        step: the step under way.
    """
    name = os.environ.get(END_VARIABLE)
    if not name:
        return
    end = RankEnd(kind or _KINDS.get(status, EndKind.FAILED), status, message, os.getpid(), phase, step)
    path = Path(name)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    # No fsync and no error: a full or slow disk must not keep a rank from ending. A report that is missing or cut short
    # costs a message, since the exit status says what to do.
    with suppress(OSError):
        try:
            temporary.write_text(json.dumps(asdict(end)) + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)


def unfinished_reports(path: Path) -> list[Path]:
    """List what ranks that were killed while they wrote the report ``path`` have left of it."""
    return list(path.parent.glob(f".{path.name}.*.tmp"))


def read_end(path: Path, pid: int) -> RankEnd | None:
    """Return the report in ``path``; None if there is none that process ``pid`` wrote in full."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        end = RankEnd(**content | {"kind": EndKind(content["kind"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    of_types = (
        isinstance(end.status, int)
        and isinstance(end.message, str)
        and isinstance(end.phase, str | None)
        and isinstance(end.step, int | None)
    )
    return end if of_types and end.pid == pid else None
