"""List what a run's folder of checkpoints holds, from manifests and file sizes alone; computes no checksums."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from megamoe.checkpoint.folders import abandoned_of, checkpoint_step, checkpoints_of, incomplete_of
from megamoe.checkpoint.manifest import check_sizes, read_manifest
from megamoe.core.errors import CheckpointError
from megamoe.core.run_folder import RunFolder
from megamoe.metrics.metrics_file import read_metrics


@dataclass(frozen=True)
class Listed:
    """A checkpoint folder.

    Attributes:
        step: Optimizer steps done.
        folder: Where it is.
        status: ``complete``, ``damaged``, ``incomplete`` (being written, or interrupted) or ``abandoned``.
        written: Time of writing, ISO 8601 in UTC.
        size: Bytes on disk.
        layout: Layout that wrote it; None if the manifest cannot be read.
        loss: Loss of that step in metrics.jsonl, if recorded.
        problem: Why it looks damaged, if it does.
    """

    step: int
    folder: Path
    status: str
    written: str
    size: int
    layout: str | None
    loss: float | None
    problem: str | None


def list_checkpoints(run: Path) -> list[Listed]:
    """List all checkpoints of a run by step, including half-written and abandoned ones.

    Raises:
        CheckpointError: ``run`` is not the folder of a run.
    """
    if not RunFolder(run).checkpoints.is_dir():
        raise CheckpointError(f"{run}: has no folder checkpoints; give the folder of a run that has trained")
    losses = _losses(run)
    found = [_look(step, folder, "complete", losses.get(step)) for step, folder in checkpoints_of(run)]
    found += [_look(step, folder, "abandoned", None) for step, folder in abandoned_of(run)]
    for folder in incomplete_of(run):
        step = checkpoint_step(folder)
        assert step is not None
        with suppress(FileNotFoundError):  # published just now
            found.append(Listed(step, folder, "incomplete", _changed(folder), _size(folder), None, None, None))
    return sorted(found, key=lambda listed: (listed.step, listed.folder.name))


def _look(step: int, folder: Path, status: str, loss: float | None) -> Listed:
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return Listed(step, folder, "damaged", _changed(folder), _size(folder), None, loss, str(error))
    problem = None
    try:
        check_sizes(folder, manifest)
    except CheckpointError as error:
        status, problem = "damaged", str(error)
    return Listed(step, folder, status, manifest.written, _size(folder), manifest.layout, loss, problem)


def _losses(run: Path) -> dict[int, float | None]:
    if not RunFolder(run).metrics.is_file():
        return {}
    return {row["step"]: row.get("loss") for row in read_metrics(run)}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _changed(folder: Path) -> str:
    return datetime.fromtimestamp(folder.stat().st_mtime, UTC).isoformat(timespec="seconds")
