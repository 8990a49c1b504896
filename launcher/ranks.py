"""The processes of one attempt at a run: start them, find out how they ended, leave none behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launcher.guard import Guard, kill_groups
from launcher.output import Tee, Terminal
from megamoe.statuses import HUNG, REQUEST_IS_WRONG, STOP_SIGNALS

POLL = 0.02  # seconds; a death is noticed within it
SETTLE = 0.2  # seconds; who died first is judged after the others had this long to follow


class Ranks:
    """``nproc`` running processes, each the leader of a session of its own, with a log file each in ``folder``.

    Use as a context manager: on the way out no process of any rank's group is left.
    """

    def __init__(self, command: Sequence[str], nproc: int, folder: Path, terminal: Terminal, guard: Guard) -> None:
        self.logs = [folder / f"rank-{rank:05d}.log" for rank in range(nproc)]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ended: dict[int, int] = {}
        self._tees: list[Tee] = []
        self._guard = guard
        port = free_port()
        try:
            for rank in range(nproc):
                env = environment(os.environ, rank, nproc, port)
                if rank == 0:
                    # Its stderr is seen on the terminal, where the traceback of a rank that only lost its peer would
                    # hide which rank failed. The launcher shows the end of the log of the one that did.
                    env["MEGAMOE_LOG"] = str(self.logs[0])
                self._start(command, env, rank, terminal)
        except BaseException:
            self._end()
            raise
        self._write_pids(folder / "pids.json")

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def pids(self) -> list[int]:
        """Process id of each rank."""
        return [process.pid for process in self._processes]

    def ended(self) -> dict[int, int]:
        """Exit status of the ranks that have ended, in the order of their ends; negative numbers are signals."""
        for rank, process in enumerate(self._processes):
            if rank not in self._ended and (status := process.poll()) is not None:
                self._ended[rank] = status
        return self._ended

    def running(self) -> bool:
        """Whether all is well so far and some rank is still at work."""
        ended = self.ended()
        return len(ended) < len(self._processes) and not any(ended.values())

    def culprit(self) -> tuple[int, int] | None:
        """(rank, exit status) of the rank that took the others down; None when none failed.

        The first death is followed at once by those of ranks whose peer has gone, and may not be the first to be seen.
        So a wrong request comes first, then a signal from outside, then a hang, then what a lost peer may look like as
        well: an abort or a plain failure, the earliest of them.
        """
        if any(self.ended().values()):
            time.sleep(SETTLE)
        failed = [(rank, status) for rank, status in self.ended().items() if status]
        return min(failed, key=lambda item: _severity(item[1]), default=None)

    def frozen(self) -> dict[int, list[int]]:
        """Processes that are stopped (SIGSTOP, a debugger): rank -> process ids in its session, its data workers too."""
        found: dict[int, list[int]] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                # state, parent, process group, session: what follows the name, which may contain anything
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if state in "Tt" and int(session) in self.pids:
                    found.setdefault(self.pids.index(int(session)), []).append(int(entry.name))
        return found

    def signal(self, signum: int) -> None:
        """Send ``signum`` to the ranks themselves; what they have started is theirs to end."""
        for process in self._processes:
            process.send_signal(signum)

    def wait(self, seconds: float) -> bool:
        """Give all ranks ``seconds`` to end; whether they have."""
        deadline = time.monotonic() + seconds
        while len(self.ended()) < len(self._processes):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL)
        return True

    def _start(self, command: Sequence[str], env: Mapping[str, str], rank: int, terminal: Terminal) -> None:
        log = self.logs[rank]
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else file,
                stderr=subprocess.PIPE if rank == 0 else file,
                start_new_session=True,
            )
        self._processes.append(process)
        self._guard.watch(self.pids)
        if process.stdout is not None and process.stderr is not None:
            self._tees.append(Tee(process.stdout, log, terminal, to_stderr=False))
            self._tees.append(Tee(process.stderr, log, terminal, to_stderr=True))

    def _end(self) -> None:
        # The whole groups, also of ranks that have ended: their data workers may not have noticed.
        kill_groups(self.pids)
        for process in self._processes:
            process.wait()
        for tee in self._tees:
            tee.finish()
        self._guard.watch([])

    def _write_pids(self, path: Path) -> None:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(dict(enumerate(self.pids))) + "\n")
        temporary.replace(path)


def environment(base: Mapping[str, str], rank: int, nproc: int, port: int) -> dict[str, str]:
    """Variables of a rank, as torchrun would set them, on top of ``base``."""
    defaults = {
        # More threads than cores over all ranks make every one of them slower.
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // nproc)),
        # A traceback of a rank that hangs or crashes has to be in its log before the process is gone.
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    if any(name == "lo" for _, name in socket.if_nameindex()):
        # All ranks are on this machine; looking up its host name fails on laptops between networks.
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    places = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": nproc,
        "LOCAL_WORLD_SIZE": nproc,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "MEGAMOE_TERMINAL": int(rank == 0 and sys.stderr.isatty()),  # rank 0 draws its bar through our pipe
    }
    return {**defaults, **base, **{name: str(value) for name, value in places.items()}}


def free_port() -> int:
    """A TCP port on this machine that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect what asks to stop in a list in place of dying from it. Under nohup SIGHUP stays ignored."""
    caught: list[int] = []
    before = {}
    for signum in (*STOP_SIGNALS, signal.SIGHUP):
        if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
            before[signum] = signal.signal(signum, lambda number, _: caught.append(number))
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _severity(status: int) -> int:
    if status == REQUEST_IS_WRONG:
        return 0
    if status < 0 and status not in (-signal.SIGABRT, -signal.SIGTERM):
        return 1
    return 2 if status == HUNG else 3
