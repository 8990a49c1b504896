"""Runs launched on a test bed as a user launches them, followed and disturbed from outside."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.chaos.training import HOOK
from launcher.elastic.events import Recovery, read_events, recoveries
from tests.slurm.jobs import BedWithJobs
from tests.training import ROOT

PATIENCE = 400.0  # seconds that anything may take, on a machine with other work


class LaunchedRun:
    """`megamoe launch slurm config.yaml --nodes 2` in ``folder``, and what becomes of it.

    Attributes:
        run: the run's folder.
        job: id of its job.
    """

    def __init__(self, bed: BedWithJobs, folder: Path, name: str, *arguments: str, pace: float = 0.5) -> None:
        self.bed, self.folder, self.run = bed, folder, folder / "runs" / name
        self._pace, self._known = folder / f"{name}.pace", 0
        self.pace(pace)
        done = self.megamoe("slurm", "config.yaml", f"run.name={name}", *arguments)
        self.job = re.findall(r"submitted job (\d+)", done.stdout)[0]

    def megamoe(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`megamoe launch ...`; has to succeed."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
        ours = {
            "PYTHONPATH": f"{HOOK}:{ROOT}",
            "OMP_NUM_THREADS": "1",
            "CHAOS_TRIAL": self.run.name,
            "CHAOS_PACE": str(self._pace),
        }
        command = [sys.executable, "-m", "megamoe", "launch", *arguments]
        environment = {**clean, **self.bed.environment, **ours}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        return done

    def pace(self, seconds: float) -> None:
        """From now on each step takes so much longer."""
        temporary = self._pace.with_suffix(".tmp")
        temporary.write_text(f"{seconds}\n")
        temporary.replace(self._pace)

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Of these kinds, in order."""
        return [event for event in read_events(self.run) if event["event"] in kinds]

    def attempts(self) -> list[str]:
        """Why the ranks were started, each time."""
        return [event["detail"]["kind"] for event in self.events("attempt")]

    def recoveries(self) -> list[Recovery]:
        """How long each fault has stopped the run."""
        return recoveries(self.run)

    def nodes(self, state: str) -> list[str]:
        """Nodes in this state: working or spare."""
        try:
            found = json.loads((self.run / "launch/state.json").read_text())
        except FileNotFoundError:
            return []
        return [node["name"] for node in found["nodes"] if node["state"] == state]

    def head(self) -> str:
        """The node of the batch script."""
        return self.bed.job(self.job)["BatchHost"]

    def another(self) -> str:
        """A working node that is not the head."""
        head = self.head()
        return next(node for node in self.nodes("working") if node != head)

    def ranks_on(self, node: str) -> list[int]:
        """Process ids, as this machine counts, of the ranks on a node."""
        found = []
        for pid in sorted(self.bed.processes(node)):
            try:
                command, variables = (Path(f"/proc/{pid}/{file}").read_bytes() for file in ("cmdline", "environ"))
            except OSError:
                continue
            if b"\0train\0" in command and b"\0RANK=" in variables and self.run.name.encode() in variables:
                found.append(pid)
        return found

    def steps(self) -> int:
        """Steps that are recorded."""
        path = self.run / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for it; fails if the job ends before."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            facts = self.bed.job(self.job)
            over = facts["JobState"] in ("CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "TIMEOUT")
            assert not over, f"job {self.job} was over ({facts['JobState']}) before {what}\n{self.said()}"
            assert time.monotonic() < deadline, f"waited in vain for {what}; {facts}\n{self.said()}"
            time.sleep(0.1)

    def until_step(self, step: int) -> None:
        """Wait until this step is recorded."""
        self.until(lambda: self.steps() >= step, f"step {step}")

    def until_goes_on(self, *kinds: str) -> dict[str, Any]:
        """Wait for the first step after attempts of these kinds, which have to be all since the last call; its event."""
        self.until(lambda: self._stepped()[0] > self._known, f"a step after {', '.join(kinds)}")
        known, (self._known, event) = self._known, self._stepped()
        found = self.attempts()[known : self._known]
        assert found == list(kinds), f"{found}\n{self.said()}"
        return event

    def _stepped(self) -> tuple[int, dict[str, Any]]:
        """(attempts up to the newest that has made a step, the event of that step)."""
        number = 0
        found: tuple[int, dict[str, Any]] = (0, {})
        for event in self.events("attempt", "step"):
            if event["event"] == "attempt":
                number += 1
            else:
                found = number, event
        return found

    def said(self) -> str:
        """The job's log, over all its starts."""
        return "".join(path.read_text(errors="replace") for path in sorted((self.run / "logs").glob("*-*.log")))

    def end(self) -> dict[str, str]:
        """Let it come to its end quickly, which has to be a good one; what SLURM says of the job."""
        self.pace(0)
        facts = self.bed.wait_job(self.job, timeout=PATIENCE)
        assert facts["JobState"] == "COMPLETED", f"{facts}\n{self.said()}"
        return facts
