"""The checkpoint folders of a run: ``RUN/checkpoints/step-00000100`` is complete or absent, never in between.

Names that begin with a dot are not checkpoints to go on from::

    .incomplete-step-N   being written, or left by a save that was interrupted
    .replaced-step-N     the former step-N while another takes its place; it counts as step-N as long as that is absent
    .abandoned-step-N    of a history that was left: the run went on from an earlier step, or from another run's checkpoint
    .deleted-step-N      being deleted
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

_NAME = re.compile(r"(?:\.(incomplete|replaced|abandoned|deleted)-)?step-(\d{8,})(?:\.(\d+))?")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` optimizer steps."""
    return f"step-{step:08d}"


def checkpoint_step(folder: Path) -> int | None:
    """The step that a folder's name, any of the above, says; None if it is no name of a checkpoint."""
    match = _NAME.fullmatch(folder.name)
    return int(match[2]) if match else None


def checkpoints_of(run: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run as (step, folder), oldest first."""
    found = dict(_folders(run, "replaced"))
    return sorted({**found, **dict(_folders(run, None))}.items())


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, if there is one."""
    found = checkpoints_of(run)
    return found[-1][1] if found else None


def incomplete_of(run: Path) -> list[Path]:
    """Half-written checkpoints: of a save that is under way, or of one that was interrupted."""
    return [folder for _, folder in _folders(run, "incomplete")]


def abandoned_of(run: Path) -> list[tuple[int, Path]]:
    """Checkpoints that were set aside as (step, folder), oldest first."""
    return _folders(run, "abandoned")


def incomplete_path(folder: Path) -> Path:
    """Where a checkpoint is written before it gets its final name."""
    return folder.with_name(f".incomplete-{folder.name}")


def publish(folder: Path) -> None:
    """Give a completely written checkpoint its final name. One of the same step gives way, and is whole until then."""
    replaced = folder.with_name(f".replaced-{folder.name}")
    if folder.exists():
        if replaced.exists():
            delete(replaced)
        folder.rename(replaced)
    incomplete_path(folder).rename(folder)
    sync_folder(folder.parent)
    if replaced.exists():
        delete(replaced)


def set_aside(run: Path, keep: int, newer_only: bool) -> list[Path]:
    """Rename the checkpoints of a history that is left, so that nobody goes on from them by accident.

    Args:
        run: Folder of the run.
        keep: The step that the run goes on from.
        newer_only: Whether the checkpoints before ``keep`` are of the history that goes on.

    Returns:
        Where they are now.
    """
    moved = []
    for step, folder in checkpoints_of(run):
        if step > keep or (step < keep and not newer_only):
            moved.append(folder.rename(_free(folder.with_name(f".abandoned-{checkpoint_name(step)}"))))
    if moved:
        sync_folder(run / "checkpoints")
    return moved


def tidy(run: Path) -> list[Path]:
    """Finish what an interrupted save or deletion left. Returns the half-written checkpoints, which are deleted."""
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
    """Of steps with checkpoints those that go: all but the last ``keep`` and, if it is not 0, every ``keep_every``-th."""
    return [step for step in sorted(steps)[:-keep] if not keep_every or step % keep_every]


def retain(run: Path, newest: int, keep: int, keep_every: int) -> None:
    """Delete the checkpoints that need not stay, of those up to step ``newest``; see :func:`to_delete`.

    A later one is not of this history; it neither counts nor goes.
    """
    found = {step: folder for step, folder in checkpoints_of(run) if step <= newest}
    for step in to_delete(list(found), keep, keep_every):
        delete(found[step])


def delete(folder: Path) -> None:
    """Delete a checkpoint; it is absent at once, whatever interrupts this."""
    doomed = _free(folder.with_name(f".deleted-{folder.name[folder.name.index('step-') :]}"))
    folder.rename(doomed)
    shutil.rmtree(doomed)


def sync_folder(folder: Path) -> None:
    """Bring renames in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _folders(run: Path, kind: str | None) -> list[tuple[int, Path]]:
    found = []
    parent = run / "checkpoints"
    for folder in parent.iterdir() if parent.is_dir() else ():
        match = _NAME.fullmatch(folder.name)
        # Of the plain names only the exact ones: step-00000100.2 is not ours.
        if match and match[1] == kind and (kind or not match[3]) and folder.is_dir():
            found.append((int(match[2]), folder))
    return sorted(found)


def _free(path: Path) -> Path:
    """``path``, or the first of path.2, path.3, ... that is not taken."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_name(f"{path.name}.{number}"), number + 1
    return free
