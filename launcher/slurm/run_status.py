"""Report the state of a run from its folder and from SLURM's queue."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.elastic.events import read_events, recoveries
from launcher.slurm.request import Request, excluded_nodes
from launcher.slurm.submission import living_jobs
from launcher.workers.run_progress import run_state
from megamoe.config import load_config
from megamoe.core.errors import UserError
from megamoe.core.run_folder import RunFolder


def read_status(run_dir: Path) -> dict[str, Any]:
    """Return all that is known of a launched run.

    Returns:
        ``run`` (folder), ``jobs`` (id -> kind, state, nodes, elapsed, limit, reason; those in the queue), ``queue`` (why
        SLURM could not be asked, or null), ``step``, ``steps``, ``saved`` (step of the newest checkpoint), ``excluded``
        (node -> reason), ``supervisor`` (what state.json in RUN/launch says, or null), ``events`` (those of events.jsonl),
        ``recoveries`` (kind, seconds and step of each way from a fault to the first new step, and
        seconds of it that the cluster took).

    Raises:
        UserError: nothing was launched there.
    """
    run_dir = run_dir.absolute()
    request = Request.read(run_dir)
    queue, jobs = None, {}
    try:
        jobs = living_jobs(run_dir)
    except UserError as error:
        queue = str(error)
    progress = run_state(run_dir, launched=0)
    return {
        "run": str(run_dir),
        "jobs": jobs,
        "queue": queue,
        "step": progress.reached,
        "steps": load_config(request.config, request.overrides).train.steps,
        "saved": progress.saved,
        "excluded": excluded_nodes(run_dir),
        "supervisor": _state(run_dir),
        "events": read_events(run_dir),
        "recoveries": [dataclasses.asdict(recovery) for recovery in recoveries(run_dir)],
    }


def as_text(status: dict[str, Any], events: int) -> str:
    """Format a status for people: the job, its progress, its nodes, the last ``events`` events."""
    state = status["supervisor"] or {}
    over = not status["jobs"] and status["queue"] is None
    head = [("run", status["run"])]
    head += [
        ("job" if job["kind"] == "run" else f"{job['kind']} job", _job(id_, job)) for id_, job in status["jobs"].items()
    ]
    if status["queue"] is not None:
        head.append(("job", f"unknown: {status['queue']}"))
    elif over:
        head.append(("job", "none of this run is in the queue"))
    head.append(("step", f"{status['step']:,} of {status['steps']:,}, saved up to {status['saved']:,}"))
    if state:
        last = (
            "; the last that was heard of it"
            if over and state.get("phase") not in ("done", "stopped", "again", "failed")
            else ""
        )
        attempt = "" if state["attempt"] is None else f", attempt {state['attempt']}"
        head.append(("phase", f"{state['phase']}{attempt}{last}"))
        if state["layout"]:
            head.append(("layout", state["layout"]))
    head += [("excluded", f"{node}: {why}") for node, why in status["excluded"].items()]
    text = [f"{label:<11}{value}" for label, value in head]
    if nodes := state.get("nodes"):
        text += ["", *_table(("node", "address", "state", "job", "since"), [_node(node) for node in nodes])]
    if recoveries := status["recoveries"]:
        rows = [
            [each["kind"], f"{each['seconds']:.1f} s", f"{each['waited']:.1f} s", str(each["step"])] for each in recoveries
        ]
        text += ["", *_table(("recovery", "took", "of it the cluster", "to step"), rows)]
    if events and status["events"]:
        text += [
            "",
            *_table(("time", "event", "node", "step", ""), [_event(event) for event in status["events"][-events:]]),
        ]
    return "\n".join(text)


def _job(name: str, job: dict[str, str]) -> str:
    if job["state"] == "PENDING":
        return f"{name}, waits ({job['reason']})"
    return f"{name}, {job['state'].lower()} on {job['nodes'] or 'no nodes'} for {job['elapsed']} of {job['limit']}"


def _node(node: dict[str, Any]) -> list[str]:
    return [str(node.get(key) or "-") for key in ("name", "address", "state", "job")] + [_clock(node.get("since"))]


def _event(event: dict[str, Any]) -> list[str]:
    detail = event["detail"]
    if event["event"] == "attempt":
        text = f"{detail['attempt']} ({detail['kind']}) on {', '.join(detail['nodes'])}: {detail['layout']}"
    else:
        text = ", ".join(f"{key} {_counted(value)}" for key, value in detail.items() if value not in (None, ""))
    return [
        _clock(event["time"]),
        event["event"],
        event["node"] or "-",
        "-" if event["step"] is None else str(event["step"]),
        text,
    ]


def _counted(value: object) -> str:
    """Count equal exit statuses of many ranks; format any other value as it is."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{status} of {count} ranks" for status, count in Counter(value.values()).items())


def _clock(when: object) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)) if isinstance(when, int | float) else str(when or "-")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]


def _state(run_dir: Path) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError, ValueError):
        content: dict[str, Any] = json.loads(RunFolder(run_dir).launch.state.read_text(encoding="utf-8"))
        return content
    return None
