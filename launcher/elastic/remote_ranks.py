"""The ranks of one attempt over several nodes, seen through their agents."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from launcher.elastic.control_server import Hub, Node
from launcher.elastic.messages import Message
from launcher.workers.placement import Place
from launcher.workers.processes import write_pids
from launcher.workers.rank_group import POLL, RankGroup
from megamoe.core.run_folder import AttemptFolder

ANSWER = 2.0  # seconds; an agent answers in milliseconds, unless its node is in trouble


class Team(RankGroup):
    """Ranks on ``nodes``, started at once; neighbours in the list hold consecutive ranks.

    Use as a context manager: on the way out all ranks have ended, or their nodes are lost.

    Args:
        hub: the control port.
        nodes: who works.
        ranks: of each node.
        config: path of the config file.
        resume: ``auto``, ``none`` or a checkpoint.
        overrides: ``KEY=VALUE`` settings.
        folder: logs/attempt-A of the run.
        bind: whether each rank gets its own share of its node's cores.
    """

    def __init__(
        self,
        hub: Hub,
        nodes: Sequence[Node],
        ranks: int,
        config: Path,
        resume: str,
        overrides: Sequence[str],
        folder: AttemptFolder,
        bind: bool,
    ) -> None:
        self.nodes = list(nodes)
        self.folder = folder
        self.logs = {rank: folder.log(rank) for rank in range(len(nodes) * ranks)}
        self.pids = {}
        self._hub, self._ranks, self._attempt = hub, ranks, folder.number
        self._ended: dict[int, int] = {}
        self._idle: set[Node] = set()
        for node in self.nodes:
            node.take_all()  # of earlier attempts
        port = self._port()
        if port is None:
            return  # the first node is lost
        for number, node in enumerate(self.nodes):
            place = Place(
                number * ranks, ranks, len(self.logs), number, hub.address(nodes[0]), port, address=hub.address(node)
            )
            node.wire.send(
                "start",
                attempt=self._attempt,
                place=asdict(place),
                workdir=os.getcwd(),
                config=str(config),
                resume=resume,
                overrides=list(overrides),
                bind=bind,
            )

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        self._tell("end", attempt=self._attempt)
        # No limit is needed here: a node that does not answer is lost after launch.node_timeout.
        while any(node not in self._idle for node in self._there()):
            self.pause(POLL)

    def lost(self) -> list[Node]:
        """Return the nodes that were lost since the start."""
        return [node for node in self.nodes if node.gone]

    def of_node(self, node: Node) -> range:
        """Return the ranks of one of the nodes."""
        first = self.nodes.index(node) * self._ranks
        return range(first, first + self._ranks)

    def ended(self) -> Mapping[int, int]:
        """As in the base class; the ranks of a lost node count as killed."""
        for node in self.nodes:
            for message in node.take_all():
                self._take(node, message)
            if node.gone:
                for rank in self.of_node(node):
                    self._ended.setdefault(rank, -signal.SIGKILL)
        return self._ended

    def signal(self, signum: int) -> None:
        self._tell("signal", signum=int(signum))

    def frozen(self) -> Mapping[int, list[int]]:
        found: dict[int, list[int]] = {}
        self._tell("frozen")
        for node in self._there():
            if (answer := self._answer(node, "frozen", ANSWER)) is not None:
                found |= {int(rank): list(processes) for rank, processes in answer["processes"].items()}
        return found

    def pause(self, seconds: float) -> None:
        """Take in what the agents say for so long."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._hub.poll(left)
            self.ended()

    def _port(self) -> int | None:
        self.nodes[0].wire.send("port")
        answer = self._answer(self.nodes[0], "port", float("inf"))
        return None if answer is None else int(answer["port"])

    def _answer(self, node: Node, verb: str, seconds: float) -> Message | None:
        """Wait for the answer of ``node`` to a question; None if it is lost, or silent for ``seconds``."""
        deadline = time.monotonic() + seconds
        while not node.gone and time.monotonic() < deadline:
            if (message := node.take(verb)) is not None:
                return message
            self._hub.poll(POLL)
        return None

    def _take(self, node: Node, message: Message) -> None:
        if message.get("attempt") != self._attempt:
            return
        match message:
            case {"verb": "started", "pids": dict(pids)}:
                self.pids |= {int(rank): int(pid) for rank, pid in pids.items() if int(rank) in self.of_node(node)}
                if len(self.pids) == len(self.logs):
                    write_pids(self.folder, dict(sorted(self.pids.items())))
            case {"verb": "ended", "rank": int(rank), "status": int(status)} if rank in self.of_node(node):
                self._ended.setdefault(rank, status)
            case {"verb": "idle"}:
                self._idle.add(node)

    def _there(self) -> list[Node]:
        return [node for node in self.nodes if not node.gone]

    def _tell(self, verb: str, **fields: object) -> None:
        for node in self._there():
            node.wire.send(verb, **fields)
