"""Every path of a run's folder. No other file spells these names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_ATTEMPT = re.compile(r"attempt-(\d+)")
_CHECKPOINT = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class AttemptFolder:
    """RUN/logs/attempt-A: what the ranks of one attempt said, and how they ended.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def name(self) -> str:
        """``attempt-A``."""
        return self.path.name

    @property
    def number(self) -> int:
        """A, counted from 1."""
        match = _ATTEMPT.fullmatch(self.path.name)
        assert match, f"{self.path} is no attempt's folder"
        return int(match[1])

    @property
    def pids(self) -> Path:
        """Process id of each rank, as JSON."""
        return self.path / "pids.json"

    def log(self, rank: int) -> Path:
        """Output of a rank."""
        return self.path / f"rank-{rank:05d}.log"

    def end(self, rank: int) -> Path:
        """How a rank ended, see :mod:`megamoe.core.rank_end`."""
        return self.path / f"rank-{rank:05d}.end.json"


@dataclass(frozen=True)
class LaunchFolder:
    """RUN/launch: what a run on several nodes keeps about its jobs, supervisor and nodes.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """Copy of the config as it was submitted."""
        return self.path / "config.yaml"

    @property
    def request(self) -> Path:
        """What a job is to run."""
        return self.path / "request.json"

    @property
    def started(self) -> Path:
        """Exists once the request has been started."""
        return self.path / "started"

    @property
    def jobs(self) -> Path:
        """Folder with an empty file ID.KIND for each job of the run."""
        return self.path / "jobs"

    @property
    def excluded(self) -> Path:
        """Nodes that the run does not use any more."""
        return self.path / "excluded.json"

    @property
    def job_script(self) -> Path:
        """Batch script of the run's job."""
        return self.path / "job.sh"

    @property
    def helper_script(self) -> Path:
        """Batch script of a job that only brings further nodes."""
        return self.path / "helper.sh"

    @property
    def supervisor(self) -> Path:
        """Where the supervisor listens."""
        return self.path / "supervisor.json"

    @property
    def pulse(self) -> Path:
        """The supervisor's sign of life."""
        return self.path / "pulse"

    @property
    def state(self) -> Path:
        """What the supervisor and its nodes do now."""
        return self.path / "state.json"

    @property
    def events(self) -> Path:
        """What has happened since the run began."""
        return self.path / "events.jsonl"

    def health_log(self, node: str) -> Path:
        """What the network test said on a node."""
        return self.path / f"health-{node}.log"

    def orphaned(self, supervisor: str) -> Path:
        """Claimed by the one agent that acts when a supervisor is dead."""
        return self.path / f"orphaned-{supervisor}"


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run.

    Attributes:
        path: the folder, ``config.run.folder``.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that the run was trained with."""
        return self.path / "tokenizer.model"

    @property
    def metrics(self) -> Path:
        """One record per optimizer step."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of the same figures for TensorBoard."""
        return self.path / "tensorboard"

    @property
    def memory(self) -> Path:
        """Predicted and measured peak memory of each rank."""
        return self.path / "memory.json"

    @property
    def index(self) -> Path:
        """Folder of shard indexes that could not be written beside their shards."""
        return self.path / "index"

    @property
    def audit(self) -> Path:
        """Folder of the audit: which sample filled which slot of which step."""
        return self.path / "audit"

    @property
    def lost(self) -> Path:
        """Folder of the samples that could not be used."""
        return self.path / "lost"

    @property
    def results(self) -> Path:
        """Figures of ``megamoe eval``."""
        return self.path / "eval.json"

    @property
    def captions(self) -> Path:
        """Folder of pictures with true and generated captions."""
        return self.path / "eval"

    @property
    def report(self) -> Path:
        """The run as one HTML page."""
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """Folder of all logs."""
        return self.path / "logs"

    @property
    def launch(self) -> LaunchFolder:
        """What a run on several nodes keeps about itself."""
        return LaunchFolder(self.path / "launch")

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after ``step`` optimizer steps."""
        return self.checkpoints / f"step-{step:08d}"

    def complete_checkpoints(self) -> dict[int, Path]:
        """Return the folders of all complete checkpoints by step, in no particular order."""
        found = ((_CHECKPOINT.fullmatch(path.name), path) for path in self.checkpoints.glob("step-*"))
        return {int(match[1]): path for match, path in found if match}

    def audit_of(self, rank: int) -> Path:
        """The audit of one rank."""
        return self.audit / f"rank-{rank:05d}.jsonl"

    def lost_of(self, rank: int) -> Path:
        """The lost samples of one rank."""
        return self.lost / f"rank-{rank:05d}.jsonl"

    def attempt(self, number: int) -> AttemptFolder:
        """The logs of attempt ``number``."""
        return AttemptFolder(self.logs / f"attempt-{number}")

    def latest_attempt(self) -> AttemptFolder | None:
        """Return the logs of the newest attempt; None before the first."""
        attempts = [AttemptFolder(path) for path in self.logs.glob("attempt-*") if _ATTEMPT.fullmatch(path.name)]
        return max(attempts, key=lambda attempt: attempt.number, default=None)

    def job_logs(self) -> list[Path]:
        """Return the logs of the run's batch jobs, in no particular order."""
        return list(self.logs.glob("job-*.log"))
