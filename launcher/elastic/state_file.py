"""Keep RUN/launch/state.json up to date: what the supervisor and its nodes do now."""

from __future__ import annotations

import os
import socket
import time

from launcher.elastic.control_server import Hub
from launcher.elastic.events import History
from launcher.elastic.remote_ranks import Team
from megamoe.parallel.layout import Layout


class Report:
    """Writes the state whenever it changes.

    Attributes:
        job: allocation that the supervisor runs in.
    """

    def __init__(self, history: History, hub: Hub, job: str) -> None:
        self.job = job
        self._history, self._hub = history, hub
        self._current: dict[str, object] = {}
        self._team: Team | None = None

    def state(
        self,
        phase: str,
        attempt: int | None = None,
        layout: Layout | None = None,
        team: Team | None = None,
        resume: str | None = None,
    ) -> None:
        """Enter a phase: starting, waiting, checking, running, stopping, done, stopped, again or failed."""
        self._team = team
        self._current = {
            "phase": phase,
            "since": time.time(),
            "job": self.job,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "attempt": attempt,
            "layout": layout.describe() if layout is not None else None,
            "resume": resume,
        }
        self.refresh()

    def refresh(self) -> None:
        """Write the state again, since the nodes have changed."""
        working = self._team.nodes if self._team is not None else []
        lost = [node for node in working if node.gone]
        rows = [
            {
                "name": node.name,
                "address": node.wire.addresses[1] if node.gone else self._hub.address(node),
                "job": node.job,
                "state": "lost" if node.gone else "working" if node in working else "spare",
                "since": node.joined,
                "ranks": list(self._team.of_node(node)) if self._team is not None and node in working else [],
                "why": node.gone or None,
            }
            for node in [*self._hub.nodes.values(), *lost]
        ]
        self._history.state(self._current | {"nodes": rows})
