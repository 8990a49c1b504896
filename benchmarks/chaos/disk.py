"""A disk of its own for a run or its checkpoints, small enough to fill up."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psutil


class SmallDisk:
    """A tmpfs on ``folder``. Where nothing may be mounted, ``mounted`` is False and a limit on the size of files serves.

    Args:
        folder: Made if it is not there.
        size: Bytes.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "chaos", str(folder)]
        try:
            self.mounted = subprocess.run(command, capture_output=True).returncode == 0
        except FileNotFoundError:
            self.mounted = False
        self._ballast = folder / ".ballast"

    def fill(self, left: int, ranks: list[int]) -> None:
        """Leave ``left`` bytes free; without a mount no file of ``ranks`` may get longer than that."""
        if not self.mounted:
            for rank in ranks:
                psutil.Process(rank).rlimit(psutil.RLIMIT_FSIZE, (left, psutil.RLIM_INFINITY))
            return
        with self._ballast.open("wb") as file:
            free = os.statvfs(self.folder)
            os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - left))

    def free(self) -> None:
        """Make room again; ranks that start from now on have no limit anyway."""
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Take the disk away, with all that is on it."""
        unmount(self.folder)


def unmount(folder: Path) -> None:
    """Take away what an interrupted trial has left mounted on ``folder``."""
    while os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
