"""What the history of a run says when its supervisor starts and ends: why it is started, and whether to start it again."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from launcher.history import read_events
from launcher.invitation import Pulse


def how_it_begins(run_dir: Path) -> tuple[str, float]:
    """Kind of the first attempt (see :mod:`launcher.history`), and when what led to it was noticed."""
    events = read_events(run_dir)
    for event in reversed(events):
        match event:
            case {"event": "again", "detail": {"accepted": True}}:
                return "again", float(event["time"])
            case {"event": "finished"}:
                continue
            case _:
                break
    if not events or events[-1]["event"] == "finished":
        return "start", time.time()
    # The supervisor ended without a word, and was alive for the last time when its pulse beat, or it wrote that event.
    since = float(events[-1]["time"])
    with contextlib.suppress(ValueError):
        since = max(since, float(Pulse(run_dir).read()))
    return "host", since


def in_vain(run_dir: Path, saved: int, limit: int) -> str | None:
    """Why not to start the run again: that was done ``limit`` times in a row without a checkpoint later than ``saved``."""
    times = 0
    for event in reversed([each for each in read_events(run_dir) if each["event"] == "again"]):
        if event["detail"]["saved"] < saved:
            break
        times += 1
    if times < limit:
        return None
    return f"no progress: started again {times} times in a row with no checkpoint later than step {saved}"
