"""Define jobs for tests of map_jobs that worker processes can import; as a program, run a slow `megamoe data` verb."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def square(n: int) -> int:
    return n * n


def square_by(n: int) -> tuple[int, int]:
    """Return the process too, slowly enough that every worker gets some jobs."""
    time.sleep(0.02)
    return n * n, os.getpid()


def die_once(job: tuple[int, Path]) -> int:
    """Kill the process of the job whose number has a file there, the first time."""
    n, folder = job
    trap = folder / str(n)
    if trap.exists():
        trap.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return n * n


def count_others(job: tuple[int, Path]) -> int:
    """Return the maximum number of these jobs that run while this one does."""
    n, folder = job
    mine = folder / f"running-{n}"
    mine.touch()
    most = 0
    for _ in range(10):
        most = max(most, len(list(folder.glob("running-*"))))
        time.sleep(0.01)
    mine.unlink()
    return most


def die_at_7(n: int) -> int:
    time.sleep(0.02)
    if n == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def fail_at_3(n: int) -> int:
    if n == 3:
        raise ValueError("not a number that I like")
    return n


class TwoPartError(Exception):
    """An error that pickle cannot make again."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")


def fail_oddly(n: int) -> int:
    raise TwoPartError("number", str(n))


def write_slowly(folder: Path) -> None:
    """Hold an unfinished file for a minute."""
    from megamoe.core.files import atomic_file

    with atomic_file(folder / f"made-{os.getpid()}") as file:
        file.write(b"x")
        file.flush()
        (folder / f"started-{os.getpid()}").touch()
        time.sleep(60)


def main(folder: Path) -> None:
    from data_tools.distribute.jobs import map_jobs
    from megamoe.cli import main as megamoe
    from megamoe.commands.data.group import data

    @data.command()
    def slow() -> None:
        for _ in map_jobs(write_slowly, [folder] * 9, label="slow", unit="folder", processes=2):
            pass

    megamoe(["data", "slow"])


if __name__ == "__main__":
    import sys

    main(Path(sys.argv[1]))
