"""A training of a trial: launched as a user launches it, looked at from outside while it runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from benchmarks.chaos.plan import LAYOUTS
from tests.training import ROOT

HOOK = Path(__file__).parent / "hook"
PATIENCE = 400.0  # seconds that any moment may take to come, on a machine with other work
_HIDE = ["unshare", "--mount", "sh", "-c"]


class Missed(Exception):
    """A fault's moment did not come, or a training did not end as it should."""


class Training:
    """`megamoe train --resume auto` of one run, launched once or several times, one after the other.

    Args:
        folder: Where the config and the data are.
        run: Folder of the run.
        settings: Settings for the command line.
        variables: Environment of all processes of the trial; by CHAOS_TRIAL they are known.
        shared_memory: A folder that they see as /dev/shm, so that what is left there is known to be theirs; None where
            :func:`can_hide` says no.
    """

    def __init__(
        self,
        folder: Path,
        run: Path,
        settings: tuple[str, ...],
        variables: Mapping[str, str],
        shared_memory: Path | None = None,
    ) -> None:
        self.shared_memory = shared_memory
        self.folder, self.run, self._settings = folder, run, settings
        self._environment = os.environ | {"PYTHONPATH": f"{HOOK}:{ROOT}", "OMP_NUM_THREADS": "1"} | dict(variables)
        self.token = self._environment["CHAOS_TRIAL"]
        self.said = folder / "said" / f"{run.name}.txt"
        self.said.parent.mkdir(exist_ok=True)
        self.said.unlink(missing_ok=True)
        self.process: subprocess.Popen[bytes] | None = None
        self._from_attempt = 1  # attempts before it are over
        self.history: list[tuple[float, int]] = []  # (time, last step recorded then), where it changed
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def launch(self, layout: str) -> None:
        """Start the launcher under a layout; the one before has ended."""
        ranks, overrides = LAYOUTS[layout]
        command = [sys.executable, "-m", "megamoe", "train", "config.yaml", "--nproc", str(ranks), "--resume", "auto"]
        if self.shared_memory is not None:
            # Each of these replaces the one before: the launcher has the process id that is killed.
            command = [*_HIDE, 'mount --bind "$0" /dev/shm && exec "$@"', str(self.shared_memory), *command]
        self._from_attempt = self._attempt() + 1
        with self.said.open("ab") as said:
            said.write(f"--- {layout}\n".encode())
            said.flush()
            self.process = subprocess.Popen(
                [*command, f"run.name={self.run.name}", *overrides, *self._settings],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )

    def ranks(self) -> list[int]:
        """Process ids of the ranks of the attempt under way; none before it has started."""
        path = self.run / "logs" / f"attempt-{self._attempt()}" / "pids.json"
        if self._attempt() < self._from_attempt or not path.exists():
            return []
        return list(json.loads(path.read_text()).values())

    def attempt_is_over(self) -> None:
        """A fault has ended the attempt under way: the next one counts."""
        self._from_attempt = self._attempt() + 1

    def last_step(self, of_attempt: bool = True) -> int:
        """The last step in metrics.jsonl; ``of_attempt``: 0 while the file is as the attempts before have left it."""
        try:
            path = self.run / "metrics.jsonl"
            if of_attempt:
                started = self.run / "logs" / f"attempt-{self._attempt()}" / "pids.json"
                if not self.ranks() or path.stat().st_mtime_ns <= started.stat().st_mtime_ns:
                    return 0
            steps = re.findall(rb'^\{"step":(\d+)[^\n]*\n', path.read_bytes(), re.MULTILINE)
            return int(steps[-1]) if steps else 0
        except OSError:
            return 0

    def saving(self) -> bool:
        """Whether a checkpoint is half written now."""
        return any((self.run / "checkpoints").glob(".incomplete-*"))

    def checkpoints(self) -> list[Path]:
        """Complete ones, oldest first."""
        return sorted((self.run / "checkpoints").glob("step-*"))

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition while the launcher runs.

        Raises:
            Missed: the launcher has ended before, or it took too long.
        """
        assert self.process is not None
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None:
                raise Missed(f"the launcher ended with status {self.process.returncode} before {what}")
            if time.monotonic() > deadline:
                raise Missed(f"waited {PATIENCE:g} s in vain for {what}")
            time.sleep(0.003)

    def end(self) -> int:
        """Exit status of the launcher, when it has ended.

        Raises:
            Missed: it does not end.
        """
        assert self.process is not None
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Missed(f"the launcher did not end within {PATIENCE:g} s") from None

    def processes(self) -> list[psutil.Process]:
        """All processes of the trial that live, whoever has started them."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get("CHAOS_TRIAL") == self.token and process.pid != os.getpid()
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue  # it has ended meanwhile, or is another user's
        return found

    def all_gone(self, seconds: float = 10.0) -> list[str]:
        """Wait for all processes to end; those that have not are killed and named."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        names = []
        for process in left:
            try:
                names.append(f"process {process.pid}: {' '.join(process.cmdline())[:120]}")
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        return names

    def close(self) -> None:
        """Stop looking, and leave nothing running."""
        self._done.set()
        self._watcher.join()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.all_gone()

    def _attempt(self) -> int:
        return max((int(path.name[8:]) for path in self.run.glob("logs/attempt-*")), default=0)

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            step = self.last_step(of_attempt=False)
            if not self.history or self.history[-1][1] != step:
                self.history.append((time.time(), step))


def can_hide() -> bool:
    """Whether a process here may have a /dev/shm of its own."""
    try:
        return subprocess.run([*_HIDE, "mount --bind /dev/shm /dev/shm"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
