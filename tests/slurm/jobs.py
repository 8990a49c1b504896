"""Jobs on a test bed, as a test talks about them."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from slurm.bed import Bed


class BedWithJobs(Bed):
    """A test bed on which commands are run and jobs are followed."""

    def run(self, *command: str | Path, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Runs a command on the submitting host, with SLURM's commands working on this bed."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**environment, **self.environment},
        )
        assert not check or done.returncode == 0, f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done

    def submit(self, *options: str | Path) -> str:
        """`sbatch` with these options and script; the job's id."""
        return self.run("sbatch", "--parsable", *options).stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Reason, NodeList, BatchHost, Restarts, ExitCode, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_job(self, job: str, *states: str, timeout: float = 60) -> dict[str, str]:
        """Waits until the job is in one of the states (by default: ended, however) and returns what scontrol says.

        Raises:
            AssertionError: It is not within `timeout` seconds, or ends in another state first.
        """
        ended = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
        end = time.monotonic() + timeout
        while (facts := self.job(job))["JobState"] not in (states or ended):
            assert facts["JobState"] not in ended, f"job {job} is {facts['JobState']}, not {' or '.join(states)}: {facts}"
            assert time.monotonic() < end, f"job {job} is not {' or '.join(states or ['ended'])} after {timeout} s: {facts}"
            time.sleep(0.2)
        return facts

    def wait_nodes(self, wanted: Callable[[dict[str, str]], bool], timeout: float = 30) -> dict[str, str]:
        """Waits until the nodes' states (in the words of sinfo) are as wanted and returns them."""
        end = time.monotonic() + timeout
        while not wanted(states := self.states()):
            assert time.monotonic() < end, f"after {timeout} s the nodes are {states}"
            time.sleep(0.2)
        return states
