"""Write files that appear complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megamoe.core.errors import DataError


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the name ``path`` only after all its bytes are on the disk.

    The temporary name starts with a dot and ends in ``.tmp``, so that no pattern for shards or indexes finds it, and it
    holds the process id, so that two writers of one file do not mix.

    Raises:
        DataError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(temporary, "wb")  # noqa: SIM115 (closed below, before it is renamed)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose a folder that can") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:  # the rename itself has to survive a power cut
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed users of :func:`atomic_file` left in ``folder``; nobody may be writing there now."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink(missing_ok=True)
