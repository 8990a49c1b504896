"""Run `megamoe` for a benchmark: the working tree or another checkout, one thread per process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment(*paths: Path) -> dict[str, str]:
    """Return the environment of a measured process: imports from ``paths`` first, one thread of OpenMP."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}


def run_megamoe(folder: Path, *arguments: str, root: Path = ROOT) -> None:
    """Run the ``megamoe`` command of the checkout ``root`` in ``folder``; if it fails, print its output and exit."""
    command = [sys.executable, "-m", "megamoe", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(root), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{root}: {' '.join(command)}\n{done.stdout}{done.stderr}")
