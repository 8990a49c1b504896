"""Show the end of a log, and what is added to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from megamoe.core.errors import UserError
from megamoe.core.run_folder import RunFolder

LOOK_EVERY = 0.5  # seconds
_TAIL = 1 << 20  # bytes in which the last lines are looked for


def newest_log(run_dir: Path, rank: int | None) -> Path | None:
    """Return the log of a run's newest job, or of a rank in its newest attempt; None when there is none yet.

    Raises:
        UserError: there is no such run, or no such rank in it.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run; give the folder of one")
    if rank is None:
        return max(RunFolder(run_dir).job_logs(), key=lambda path: path.stat().st_mtime, default=None)
    attempt = RunFolder(run_dir).latest_attempt()
    if attempt is None:
        return None
    log = attempt.log(rank)
    if not log.exists() and (there := sorted(attempt.path.glob("rank-*.log"))):
        raise UserError(
            f"--rank {rank}: {attempt.path} has logs of ranks {int(there[0].stem[5:])} to {int(there[-1].stem[5:])}"
        )
    return log if log.exists() else None


def show_log(find: Callable[[], Path | None], lines: int, follow: bool, out: BinaryIO) -> None:
    """Write the last ``lines`` of the log that ``find`` gives; then follow it, and its successors, until interrupted.

    Raises:
        UserError: there is no log, and ``follow`` is not asked for.
    """
    log = find()
    while log is None:
        if not follow:
            raise UserError("there is no log yet: the job has not started; --follow waits for it")
        time.sleep(LOOK_EVERY)
        log = find()
    place = _write_end(log, lines, out)
    while follow:
        time.sleep(LOOK_EVERY)
        newest = find()
        place = _write_from(log, place, out)
        if newest is not None and newest != log:
            out.write(f"==> {newest} <==\n".encode())
            log, place = newest, _write_from(newest, 0, out)


def _write_end(log: Path, lines: int, out: BinaryIO) -> int:
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL))
        data = file.read()
    out.write(b"".join(data.splitlines(keepends=True)[-lines:] if lines else []))
    out.flush()
    return size if size < _TAIL else max(0, size - _TAIL) + len(data)


def _write_from(log: Path, place: int, out: BinaryIO) -> int:
    with log.open("rb") as file:
        file.seek(place)
        data = file.read()
    if data:
        out.write(data)
        out.flush()
    return place + len(data)
