"""What a run over nodes records about itself: RUN/launch/state.json (now) and RUN/launch/events.jsonl (its history).

An event is {"time": seconds since the epoch, "event": what, "node": name or null, "step": number or null, "detail": {...}}.

    supervisor  one has started on `detail.host`, in job `detail.job`; its process at `detail.started`
    orphaned    an agent has had the run started again, since its supervisor is dead
    joined      a node's agent has come; detail.job
    excluded    a node is no longer used; detail.why
    lost        a node is gone; detail.why
    failed      a rank has ended; detail.rank, detail.how
    measured    the links between nodes were; detail: nodes, all_reduce_gbit, told (what is slow)
    attempt     ranks are being started; detail: attempt, kind, since, nodes, ranks, layout, resume. `kind` is why: start,
                rank, hang, port, spare, back (a node that was lost is there again), shrink, grow, leave (a node was taken
                away with a warning), again (the run was started again), host (its supervisor had died). `since` is the
                time at which that was noticed.
    step        the first step of an attempt is in the metrics (perhaps the second, where steps are very short)
    ended       all ranks of an attempt have ended; detail.statuses
    stop        asked to stop by detail.signal; what follows is the saving
    again       the cluster was asked to start the run again; detail.why, detail.accepted
    finished    the supervisor ends with detail.status
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe.core.run_folder import RunFolder


@dataclass(frozen=True)
class Recovery:
    """The time from a fault to the first step after it.

    Attributes:
        kind: as of the attempt.
        seconds: how long it took.
        step: the first step.
        waited: how much of it the cluster took to start the run again: from the last that was heard of the run until the
            process of its next supervisor began.
    """

    kind: str
    seconds: float
    step: int
    waited: float = 0.0


class History:
    """Writes both files of a run. An event is one line, so that a crash leaves whole ones."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = RunFolder(run_dir).launch
        self._folder.path.mkdir(parents=True, exist_ok=True)
        self._last = ""

    def event(self, event: str, node: str | None = None, step: int | None = None, **detail: object) -> None:
        """Add an event."""
        line = json.dumps({"time": time.time(), "event": event, "node": node, "step": step, "detail": detail})
        with self._folder.events.open("a") as file:
            file.write(line + "\n")

    def state(self, state: Mapping[str, object]) -> None:
        """Replace the state if it has changed."""
        text = json.dumps(state, indent=1)
        if text != self._last:
            self._last = text
            temporary = self._folder.state.with_name(f"{self._folder.state.name}.tmp")
            temporary.write_text(text + "\n")
            temporary.replace(self._folder.state)


def is_over(run_dir: Path) -> bool:
    """Return whether the last supervisor of a run has ended it, with no other to come by itself."""
    try:
        return json.loads(RunFolder(run_dir).launch.state.read_text())["phase"] in ("done", "stopped", "failed")
    except FileNotFoundError:
        return False


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Return all events of a run in order. A line that a crash cut short is skipped."""
    path = RunFolder(run_dir).launch.events
    events = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            events.append(json.loads(line))
    return events


def recoveries(run_dir: Path) -> list[Recovery]:
    """Return how long each fault has stopped a run, in order; skip a fault that the next one followed before any step."""
    found = []
    start: dict[str, Any] | None = None
    waited, before = 0.0, 0.0
    for event in read_events(run_dir):
        if event["event"] == "supervisor":
            waited += max(0.0, event["detail"].get("started", event["time"]) - before)
        elif event["event"] == "attempt":
            start = event["detail"]
            waited = waited if start["kind"] in ("again", "host") else 0.0
        elif event["event"] == "step" and start is not None:
            if start["kind"] != "start":
                found.append(Recovery(start["kind"], event["time"] - start["since"], event["step"], waited))
            start, waited = None, 0.0
        before = event["time"]
    return found


class FirstStep:
    """Notices the first step of an attempt by the growth of metrics.jsonl.

    The ranks cut it back to the step that they resume from, in a new file, before they add to it.
    """

    EVERY = 0.1  # seconds between looks

    def __init__(self, run_dir: Path) -> None:
        self._path = RunFolder(run_dir).metrics
        self._seen = self._look()
        self._looked = 0.0
        self.done = False

    def came(self) -> bool:
        """Return True once, at the first call after the step has come."""
        if self.done or time.monotonic() - self._looked < self.EVERY:
            return False
        self._looked = time.monotonic()
        before, self._seen = self._seen, self._look()
        self.done = before[0] == self._seen[0] and self._seen[1] > before[1]
        return self.done

    def _look(self) -> tuple[int, int]:
        """Return (inode, size); a file that is not there yet counts as an empty one."""
        try:
            with self._path.open("rb") as file:  # opened, since a network file system shows a new size only then
                file.seek(0, 2)
                return self._path.stat().st_ino, file.tell()
        except FileNotFoundError:
            return 0, 0
