"""RUN/metrics.jsonl: the record of each optimizer step, each step once however often the run was resumed."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from megamoe.core.errors import UserError
from megamoe.core.run_folder import RunFolder
from megamoe.metrics import jsonl
from megamoe.metrics.step_record import StepRecord, parse_record

_TAIL = 1 << 20  # bytes; the last record is in them


class MetricsWriter:
    """Append records to RUN/metrics.jsonl. One process of a run holds the writer.

    Args:
        run_dir: Folder of the run; created if missing.
        resume_step: Last step whose effect is in the weights. Later lines are dropped, since these steps come again.
            None for a new run.

    Raises:
        UserError: a new run is to start in a folder that already has metrics.
    """

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        path = RunFolder(run_dir).metrics
        self._last: int | None = None
        if resume_step is None:
            refuse_existing(run_dir)
        else:
            self._last = jsonl.truncate(path, resume_step)
        self._file: BinaryIO = path.open("ab")

    def write(self, record: StepRecord) -> None:
        """Append ``record``, whose step must be later than the last one. NaN and infinities become ``null``."""
        step = record["step"]
        assert isinstance(step, int), f"step {step!r} is no int"
        assert self._last is None or step > self._last, f"step {step} after step {self._last}"
        jsonl.append(self._file, jsonl.to_line(record))
        self._last = step

    def close(self) -> None:
        """Close the file. Every record is already on its way to the disk."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def refuse_existing(run_dir: Path) -> None:
    """Keep a new run from writing over an old one.

    Raises:
        UserError: ``run_dir`` has metrics of a run.
    """
    path = RunFolder(run_dir).metrics
    if path.exists() and path.stat().st_size > 0:
        raise UserError(
            f"run.dir {run_dir}: already holds a run ({path.name} is not empty); "
            "resume it with --resume auto, or choose another run.name"
        )


def read_metrics(run_dir: Path) -> list[StepRecord]:
    """Read all complete records of a run in order, even while it is being written. ``null`` reads as None.

    Raises:
        UserError: the folder has no metrics.jsonl, or a line of it is damaged.
    """
    path = RunFolder(run_dir).metrics
    if not path.exists():
        raise UserError(f"{run_dir}: no {path.name} there; name the folder of a run that has trained")
    records = []
    for number, (_, tree) in enumerate(jsonl.read_lines(path), start=1):
        try:
            records.append(parse_record(tree))
        except TypeError as error:
            raise UserError(f"{path}: line {number}: {error}; remove that line") from None
    return records


def last_step(path: Path) -> int:
    """Return the step of the last complete record of a metrics.jsonl, read from its end; 0 if there is none.

    The file may be in the middle of a write, so lines that are no records are passed over.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read().split(b"\n")[:-1]
    for line in reversed(lines):
        try:
            return parse_record(json.loads(line))["step"]
        except (ValueError, TypeError, RecursionError):
            continue
    return 0
