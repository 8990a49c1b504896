"""The processes of one attempt on this machine: start them, find out how they ended, leave none behind."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from launcher.workers.guard import Guard, kill_groups
from launcher.workers.output import Output, Tee
from launcher.workers.placement import Place, environment
from launcher.workers.rank_group import RankGroup
from megamoe.core.rank_end import END_VARIABLE, unfinished_reports
from megamoe.core.run_folder import AttemptFolder


class Ranks(RankGroup):
    """Running processes on this machine, each the leader of a session of its own.

    Use as a context manager, or call :meth:`close`: then no process of any rank's group is left.

    Args:
        command: what to start.
        environments: variables of each rank to be started, by its number.
        folder: for the log of each rank and its report of how it ended.
        terminal: gets what rank 0 says.
        guard: ends the ranks should this process be killed.
        cpus: the CPUs of each rank, if it is not to use all.
    """

    def __init__(
        self,
        command: Sequence[str],
        environments: Mapping[int, Mapping[str, str]],
        folder: AttemptFolder,
        terminal: Output,
        guard: Guard,
        cpus: Mapping[int, Collection[int]] | None = None,
    ) -> None:
        self.folder = folder
        self.logs = {rank: folder.log(rank) for rank in environments}
        self.pids = {}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._ended: dict[int, int] = {}
        self._tees: list[Tee] = []
        self._guard = guard
        try:
            for rank, environment in environments.items():
                self._start(command, environment, rank, terminal)
                if cpus is not None:
                    # The rank has one thread yet; the threads and data workers that it will start inherit this.
                    os.sched_setaffinity(self.pids[rank], cpus[rank])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ended(self) -> Mapping[int, int]:
        for rank, process in self._processes.items():
            if rank not in self._ended and (status := process.poll()) is not None:
                self._ended[rank] = status
        return self._ended

    def signal(self, signum: int) -> None:
        for process in self._processes.values():
            process.send_signal(signum)

    def frozen(self) -> Mapping[int, list[int]]:
        found: dict[int, list[int]] = {}
        ranks = {pid: rank for rank, pid in self.pids.items()}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                # state, parent, process group, session: what follows the name, which may contain anything
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if state in "Tt" and int(session) in ranks:
                    found.setdefault(ranks[int(session)], []).append(int(entry.name))
        return found

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        """Kill what is left of the ranks and of their children."""
        # Kill whole groups, also those of ranks that have ended: their data workers may live on.
        kill_groups(self.pids.values())
        for rank, process in self._processes.items():
            process.wait()
            for unfinished in unfinished_reports(self.folder.end(rank)):
                unfinished.unlink(missing_ok=True)
        for tee in self._tees:
            tee.finish()
        self._guard.watch([])

    def _start(self, command: Sequence[str], environment: Mapping[str, str], rank: int, terminal: Output) -> None:
        log = self.logs[rank]
        self.folder.end(rank).unlink(missing_ok=True)  # of an earlier process, should there be one
        env = {**environment, END_VARIABLE: str(self.folder.end(rank))}
        if rank == 0:
            # Its stderr is seen on the terminal, where the traceback of a rank that only lost its peer would
            # hide which rank failed. The launcher shows the end of the log of the one that did.
            env["MEGAMOE_LOG"] = str(log)
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else file,
                stderr=subprocess.PIPE if rank == 0 else file,
                start_new_session=True,
            )
        self._processes[rank] = process
        self.pids[rank] = process.pid
        self._guard.watch(self.pids.values())
        if process.stdout is not None and process.stderr is not None:
            self._tees.append(Tee(process.stdout, log, terminal, to_stderr=False))
            self._tees.append(Tee(process.stderr, log, terminal, to_stderr=True))


def write_pids(folder: AttemptFolder, pids: Mapping[int, int]) -> None:
    """Write the process ids of an attempt into its folder."""
    temporary = folder.pids.with_name(f"{folder.pids.name}.tmp")
    temporary.write_text(json.dumps(dict(pids)) + "\n")
    temporary.replace(folder.pids)


def local_environments(nproc: int) -> dict[int, dict[str, str]]:
    """Return the variables of ``nproc`` ranks that are all on this machine."""
    place = Place(0, nproc, nproc, 0, "127.0.0.1", free_port(), "127.0.0.1")
    # Rank 0 draws its bar through our pipe.
    base = {rank: os.environ | {"MEGAMOE_TERMINAL": str(int(rank == 0 and sys.stderr.isatty()))} for rank in range(nproc)}
    return {rank: environment(base[rank], place, rank, len(os.sched_getaffinity(0)) // nproc) for rank in base}


def free_port() -> int:
    """Find a TCP port on this machine that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
