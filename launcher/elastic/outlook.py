"""What the supervisor sees of its nodes, and what RUN/launch/state.json shows of it."""

from __future__ import annotations

import os
import socket
import time

from launcher.elastic.cluster import Wishes
from launcher.elastic.control_server import Hub, Node
from launcher.elastic.events import History
from launcher.elastic.remote_ranks import Team
from launcher.elastic.steps import Came, Candidate, Told
from launcher.health.node import clock_problem
from launcher.workers.output import Terminal
from megamoe.config.launch import LaunchConfig
from megamoe.core.exit_status import signal_name
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


class Outlook:
    """Watches the nodes that come and go, and asks the cluster for those that are missing.

    Attributes:
        at_work: nodes with ranks, those that were lost since included.

    Args:
        hub: the control port.
        report: told when nodes have changed.
        history: gets the events.
        wishes: to the cluster.
        terminal: for what people read.
        limits: of the run.
    """

    def __init__(
        self, hub: Hub, report: Report, history: History, wishes: Wishes, terminal: Terminal, limits: LaunchConfig
    ) -> None:
        self.at_work: list[Node] = []
        self._hub, self._report, self._history = hub, report, history
        self._wishes, self._terminal, self._limits = wishes, terminal, limits

    def candidates(self) -> tuple[Candidate, ...]:
        """Return the nodes that are there, and those with ranks that were lost."""
        nodes = [*self._hub.nodes.values(), *(node for node in self.at_work if node.gone)]
        return tuple(Candidate(node.name, node.joined, node.asked, node in self.at_work, bool(node.gone)) for node in nodes)

    def look(self, wish: bool) -> list[Came | Told]:
        """Take note of who has come and gone, and ask the cluster for what is missing.

        Args:
            wish: whether to ask for further nodes.

        Returns:
            What the supervisor has to remember.
        """
        found: list[Came | Told] = []
        news = self._hub.take_news()
        for what, node in news:
            found.append(Came(node.name))
            self._history.event(what, node=node.name, job=node.job, why=node.gone)
            if what == "lost":
                self._terminal.say(f"node {node.name} is lost: {node.gone}")
            elif problems := [*node.problems, *filter(None, [clock_problem(node.name, node.clock, self._limits)])]:
                self.exclude(node.name, "; ".join(map(str, problems)))
        for node in list(self._hub.nodes.values()):
            if node.asked and node.job == self._report.job:
                found.append(Told(node.asked, by_agent=True))  # the whole allocation is to stop
                node.asked = 0
            elif node.asked and node not in self.at_work:
                self._hub.dismiss(node, f"its job was told to stop ({signal_name(node.asked)})")
        self._wishes.present(self._hub.nodes)
        if wish:
            there = sum(not node.asked for node in self._hub.nodes.values())
            self._wishes.nodes(max(0, self._limits.nodes + self._limits.spares - there))
        if news:
            self._report.refresh()
        return found

    def exclude(self, name: str, why: str) -> None:
        """Never use a node again in this run."""
        self._terminal.say(f"node {name} is not used any more: {why}")
        self._history.event("excluded", node=name, why=why)
        self._hub.refuse(name, why)
        self._wishes.exclude(name, why)
