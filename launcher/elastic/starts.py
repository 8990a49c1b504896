"""Read from a run's history why its supervisor starts, and whether the run is to be started again."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from launcher.elastic.events import read_events
from launcher.elastic.invitation import Pulse


def how_it_begins(run_dir: Path, job: str) -> tuple[str, float]:
    """Return the kind of the first attempt in ``job`` (see :mod:`launcher.elastic.events`), and the time of its cause."""
    events = read_events(run_dir)
    places = [place for place, event in enumerate(events) if event["event"] == "supervisor"]
    last = events[places[-1] :] if places else []  # of the supervisor before this one
    noticed = next((float(event["time"]) for event in last if event["event"] == "stop"), None)
    again = next((event for event in last if event["event"] == "again" and event["detail"]["accepted"]), None)
    if again is not None:
        return "again", float(again["time"]) if noticed is None else noticed
    # When somebody else starts the job again (`scontrol requeue`), the supervisor only noticed the signal.
    if noticed is not None and last[0]["detail"]["job"] == job:
        return "again", noticed
    if not last or last[-1]["event"] == "finished":
        return "start", time.time()
    # The supervisor ended without a word. Its last sign of life is its last pulse or its last event.
    since = max(float(event["time"]) for event in last if event["event"] != "orphaned")
    with contextlib.suppress(ValueError):
        since = max(since, float(Pulse(run_dir).read()))
    return "host", since


def process_start() -> float:
    """Return when this process was started, before Python imported anything, in seconds since the epoch."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(fields[19]) / ticks


def in_vain(run_dir: Path, saved: int, limit: int) -> str | None:
    """Say why not to start the run again, if ``limit`` starts in a row brought no checkpoint later than ``saved``."""
    times = 0
    for event in reversed([each for each in read_events(run_dir) if each["event"] == "again"]):
        if event["detail"]["saved"] < saved:
            break
        times += 1
    if times < limit:
        return None
    return f"no progress: started again {times} times in a row with no checkpoint later than step {saved}"
