"""The checkpoint folders of a run: ``RUN/checkpoints/step-00000100`` is complete or absent, never in between.

No run resumes from a folder whose name begins with a dot::

    .incomplete-step-N   being written, or left by an interrupted save
    .replaced-step-N     the former step-N while another takes its place; counts as step-N as long as that is absent
    .abandoned-step-N    of an abandoned history: the run resumed from an earlier step, or from another run's checkpoint
    .deleted-step-N      being deleted
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from megamoe.core.run_folder import RunFolder

_NAME = re.compile(r"(?:\.(incomplete|replaced|abandoned|deleted)-)?step-(\d{8,})(?:\.(\d+))?")


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after ``step`` optimizer steps."""
    return f"step-{step:08d}"


def checkpoint_step(folder: Path) -> int | None:
    """Return the step in a folder's name, with or without prefix; None if it is not the name of a checkpoint."""
    match = _NAME.fullmatch(folder.name)
    return int(match[2]) if match else None


def checkpoints_of(run: Path) -> list[tuple[int, Path]]:
    """List the complete checkpoints of a run as (step, folder), oldest first."""
    found = dict(_folders(run, "replaced"))
    return sorted({**found, **dict(_folders(run, None))}.items())


def newest_checkpoint(run: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, if there is one."""
    found = checkpoints_of(run)
    return found[-1][1] if found else None


def incomplete_of(run: Path) -> list[Path]:
    """List half-written checkpoints, of a save in progress or of an interrupted one."""
    return [folder for _, folder in _folders(run, "incomplete")]


def abandoned_of(run: Path) -> list[tuple[int, Path]]:
    """List the checkpoints of abandoned histories as (step, folder), oldest first."""
    return _folders(run, "abandoned")


def incomplete_path(folder: Path) -> Path:
    """Return the path under which a checkpoint is written before it gets its final name."""
    return folder.with_name(f".incomplete-{folder.name}")


def publish(folder: Path) -> None:
    """Rename a completely written checkpoint to its final name.

    A checkpoint of the same step stays whole until then, and is deleted afterwards.
    """
    replaced = folder.with_name(f".replaced-{folder.name}")
    if folder.exists():
        if replaced.exists():
            delete(replaced)
        folder.rename(replaced)
    incomplete_path(folder).rename(folder)
    sync_folder(folder.parent)
    if replaced.exists():
        delete(replaced)


def abandon(run: Path, keep: int, newer_only: bool) -> list[Path]:
    """Rename the checkpoints of an abandoned history, so that no run resumes from them by accident.

    Args:
        run: Folder of the run.
        keep: The step from which the run resumes.
        newer_only: Whether the checkpoints before ``keep`` belong to the history that continues.

    Returns:
        The renamed folders.
    """
    moved = []
    for step, folder in checkpoints_of(run):
        if step > keep or (step < keep and not newer_only):
            moved.append(folder.rename(_free(folder.with_name(f".abandoned-{checkpoint_name(step)}"))))
    if moved:
        sync_folder(RunFolder(run).checkpoints)
    return moved


def tidy(run: Path) -> list[Path]:
    """Finish what interrupted saves and deletions left. Return the half-written checkpoints, which are now deleted."""
    for step, folder in _folders(run, "replaced"):
        final = folder.with_name(checkpoint_name(step))
        if final.exists():
            delete(folder)
        else:
            folder.rename(final)
    for _, folder in _folders(run, "deleted"):
        shutil.rmtree(folder)
    left = incomplete_of(run)
    for folder in left:
        shutil.rmtree(folder)
    return left


def to_delete(steps: list[int], keep: int, keep_every: int) -> list[int]:
    """Return the steps to delete: all but the last ``keep`` and, unless it is 0, multiples of ``keep_every``."""
    return [step for step in sorted(steps)[:-keep] if not keep_every or step % keep_every]


def retain(run: Path, newest: int, keep: int, keep_every: int) -> None:
    """Delete the checkpoints up to step ``newest`` that need not be kept; see :func:`to_delete`.

    Later ones belong to another history: they are neither counted nor deleted.
    """
    found = {step: folder for step, folder in checkpoints_of(run) if step <= newest}
    for step in to_delete(list(found), keep, keep_every):
        delete(found[step])


def delete(folder: Path) -> None:
    """Delete a checkpoint. It is absent at once, whatever interrupts the deletion."""
    doomed = _free(folder.with_name(f".deleted-{folder.name[folder.name.index('step-') :]}"))
    folder.rename(doomed)
    shutil.rmtree(doomed)


def sync_folder(folder: Path) -> None:
    """Flush renames in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _folders(run: Path, kind: str | None) -> list[tuple[int, Path]]:
    found = []
    parent = RunFolder(run).checkpoints
    for folder in parent.iterdir() if parent.is_dir() else ():
        match = _NAME.fullmatch(folder.name)
        # Plain names must match exactly: step-00000100.2 is not ours.
        if match and match[1] == kind and (kind or not match[3]) and folder.is_dir():
            found.append((int(match[2]), folder))
    return sorted(found)


def _free(path: Path) -> Path:
    """Return ``path``, or the first of path.2, path.3, ... that does not exist."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_name(f"{path.name}.{number}"), number + 1
    return free
