"""Record in RUN/audit which sample filled which slot of which step, so that "exactly once" can be checked by counting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from megamoe.core.run_folder import RunFolder
from megamoe.metrics import jsonl


class AuditWriter:
    """Append the samples that this rank trained on to RUN/audit/rank-00000.jsonl.

    On a resume, one rank must call :func:`truncate_audit` before any rank opens its writer.

    Args:
        run_dir: Folder of the run.
        rank: Global rank of the writer.
        enabled: The setting ``data.audit``. If false, nothing is written, not even the folder.
    """

    def __init__(self, run_dir: Path, rank: int, enabled: bool) -> None:
        self._file: BinaryIO | None = None
        if enabled:
            path = RunFolder(run_dir).audit_of(rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")

    def write(self, step: int, samples: Sequence[tuple[int, str]]) -> None:
        """Append the ``(slot, "<shard>#<key>")`` pairs of one step in a single write."""
        if self._file is not None:
            lines = (jsonl.to_line({"step": step, "slot": slot, "id": name}) for slot, name in samples)
            jsonl.append(self._file, b"".join(lines))

    def close(self) -> None:
        """Close the file. Every line is already on its way to the disk."""
        if self._file is not None:
            self._file.close()


def truncate_audit(run_dir: Path, step: int) -> None:
    """Drop what any rank recorded after ``step``: the resumed run trains on these samples again.

    The files of all ranks that ever wrote are cut, since the resumed run may have fewer ranks than before.

    Raises:
        UserError: a complete line of a file is damaged.
    """
    for path in sorted(RunFolder(run_dir).audit.glob("rank-*.jsonl")):
        jsonl.truncate(path, step)
