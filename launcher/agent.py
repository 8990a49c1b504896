"""Starts, signals and ends the ranks of one node, as the supervisor tells it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def run_agent(
    run_dir: Path,
    node: str,
    job: str,
    *,
    command: Sequence[str] = (sys.executable, "-m", "megamoe"),
    checks: Callable[[], Sequence[str]] = tuple,
    orphaned: Callable[[str], None] | None = None,
) -> int:
    """Serve the supervisor named in RUN/launch/supervisor.json until it says that the run is over.

    Args:
        run_dir: the run's folder, shared with the supervisor.
        node: name of this node; an agent of the same name takes the place of an earlier one.
        job: name of the allocation that this agent runs in (``Cluster.job`` for those of the main one).
        command: what to start in place of this Python's ``megamoe``.
        checks: looks at the node before it offers itself; the problems found, one line each, exclude it from the run.
        orphaned: has the run started again, since its supervisor is dead; called by one of the agents left, with why.

    Returns:
        Exit status: 0 dismissed by the supervisor; 1 the supervisor is gone or refused this node.
    """
    raise NotImplementedError
