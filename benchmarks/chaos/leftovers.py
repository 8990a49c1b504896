"""What a trial may have left behind: processes, shared memory, half-written files."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

from benchmarks.chaos.training import Training

_SHM = Path("/dev/shm")


def shared_memory() -> set[str]:
    """Names of all that lies in shared memory now."""
    return {path.name for path in _SHM.iterdir()}


def leftovers(training: Training, shm_before: set[str]) -> list[str]:
    """All that is left of a training that has ended, one line each."""
    left = training.all_gone()
    left += [f"/dev/shm/{name}" for name in _orphans(shm_before)]
    run = training.run
    named = training.said.read_text(errors="replace")
    for path in sorted((run / "checkpoints").iterdir()):
        # Set aside on purpose, and said so: of steps that were damaged, or not gone on from.
        aside = path.name.startswith(".abandoned-") and f"{path.name}: set aside" in named
        if not path.name.startswith("step-") and path.name != ".ballast" and not aside:
            left.append(str(path))
    for path in sorted(run.rglob("*")):
        if path.is_file() and (".tmp" in path.name or path.name.startswith(".config.yaml.")):
            left.append(str(path))
    return left


def _orphans(before: set[str]) -> list[str]:
    """What is new in shared memory and no process has open: others use it too, and theirs is not ours to judge."""
    deadline = time.monotonic() + 5
    while new := shared_memory() - before:
        used = " ".join(_mapped())
        orphans = sorted(name for name in new if f"/dev/shm/{name}" not in used)
        if not orphans or time.monotonic() > deadline:
            return orphans
        time.sleep(0.5)
    return []


def _mapped() -> list[str]:
    texts = []
    for process in psutil.process_iter():
        folder = Path(f"/proc/{process.pid}")
        try:
            texts.append((folder / "maps").read_text())
            texts += [str(link.readlink()) for link in (folder / "fd").iterdir()]
        except OSError:
            continue  # it has ended meanwhile
    return texts
