"""The supervisor's control port: agents join here, prove that they belong to the run, and report."""

from __future__ import annotations

import re
import select
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from launcher.elastic.invitation import Invitation, Pulse
from launcher.elastic.messages import BEAT, Message, Wire, new_nonce, proof, proves
from launcher.health.node import clock_difference
from launcher.workers.output import Terminal
from launcher.workers.placement import own_addresses

GREETING = 10.0  # seconds that a newcomer has to prove itself
NEWCOMERS = 64  # at a time; more are turned away, so that strangers cannot use up our file descriptors
NAME = re.compile(r"[A-Za-z0-9._-]{1,255}")


@dataclass(eq=False)
class Node:
    """A node whose agent has joined.

    Attributes:
        name: its name; an agent that says the same name takes its place.
        job: allocation that it belongs to.
        problems: what its checks found; it is not used then.
        clock: seconds that its clock is ahead of ours, at least; behind it if negative.
        joined: seconds since the epoch.
        gone: why it is lost; empty while it is there.
        asked: signal by which its agent was asked to stop; 0 if it was not.
    """

    name: str
    job: str
    problems: list[str]
    clock: float
    wire: Wire
    joined: float = field(default_factory=time.time)
    gone: str = ""
    asked: int = 0
    _inbox: list[Message] = field(default_factory=list, repr=False)

    def put(self, message: Message) -> None:
        """Keep a message for whoever waits for it."""
        self._inbox.append(message)

    def take_all(self) -> list[Message]:
        """Take out all messages, oldest first."""
        messages, self._inbox = self._inbox, []
        return messages

    def take(self, verb: str) -> Message | None:
        """Take out the oldest message of a verb; None when there is none."""
        for place, message in enumerate(self._inbox):
            if message["verb"] == verb:
                return self._inbox.pop(place)
        return None


class Hub:
    """Listens for agents. All work happens in :meth:`poll`; call it in a loop.

    A node is lost when its connection ends or when it is not heard from for ``timeout`` seconds. Agents take the
    supervisor for lost a little sooner (``patience`` in the welcome), so that the ranks of a node that was cut off are
    dead before others take their place.

    Attributes:
        nodes: by name, those that are there.
    """

    def __init__(self, run_dir: Path, job: str, timeout: float, terminal: Terminal) -> None:
        self.nodes: dict[str, Node] = {}
        self._news: list[tuple[str, Node]] = []
        self._timeout, self._terminal = timeout, terminal
        self._newcomers: dict[Wire, tuple[str, float, float]] = {}
        self._refused: dict[str, str] = {}
        self._beat = 0.0
        self._listener = socket.create_server(("", 0), backlog=128)
        self._listener.setblocking(False)
        port: int = self._listener.getsockname()[1]
        outside, loopback = own_addresses()
        hosts = [*outside, socket.gethostname(), *loopback]
        self._invitation = Invitation(hosts, port, new_nonce(), job)
        self._invitation.write(run_dir)
        self._pulse = Pulse(run_dir)
        self._run_dir = run_dir

    def poll(self, seconds: float) -> None:
        """Take in what comes within ``seconds``; returns at once when something does."""
        self._reap()  # a connection that broke while it was written to has no file descriptor any more
        wires = {node.wire: node for node in self.nodes.values()}
        sources: list[Wire | socket.socket] = [self._listener, *wires, *self._newcomers]
        for source in select.select(sources, [], [], seconds)[0]:
            if source in wires:
                for message in source.receive(0):
                    self._take(wires[source], message)
            elif source in self._newcomers:
                self._greet(source)
            else:
                self._accept()
        self._reap()
        now = time.monotonic()
        if now - self._beat > BEAT:
            self._beat = now
            self._pulse.beat()
            for node in self.nodes.values():
                node.wire.send("alive")

    def take_news(self) -> list[tuple[str, Node]]:
        """Take out which nodes have ``joined`` and which were ``lost`` since the last call, oldest first."""
        news, self._news = self._news, []
        return news

    def address(self, node: Node) -> str:
        """Return the IP address at which the other nodes reach ``node``.

        That is where its connection comes from. An agent on our own host may have come by any of the host's addresses,
        a bridge of containers for one; then it is the address that agents on other hosts have come to.
        """
        ours, theirs = node.wire.addresses
        if ours == theirs:
            for other in self.nodes.values():
                if other.wire.addresses[0] != other.wire.addresses[1]:
                    return other.wire.addresses[0]
        return theirs

    def refuse(self, name: str, why: str) -> None:
        """Turn away the node of this name, now and whenever it comes again."""
        self._refused[name] = why
        if node := self.nodes.get(name):
            node.wire.send("refused", why=why)
            self._lose(node, why)

    def dismiss(self, node: Node, why: str) -> None:
        """End this node's agent; another one of that name is welcome."""
        node.wire.send("bye")
        self._lose(node, why)

    def close(self) -> None:
        """Dismiss all agents, which then end their ranks, and take the invitation away."""
        self._invitation.remove(self._run_dir)
        for node in self.nodes.values():
            node.wire.send("bye")
        for wire in [*self._newcomers, *(node.wire for node in self.nodes.values())]:
            wire.close("dismissed")
        self._listener.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        if len(self._newcomers) >= NEWCOMERS:
            connection.close()
            return
        wire, nonce = Wire(connection), new_nonce()
        self._newcomers[wire] = nonce, time.monotonic(), time.time()
        wire.send("challenge", nonce=nonce)

    def _greet(self, wire: Wire) -> None:
        nonce, _, challenged = self._newcomers[wire]
        message = wire.first(0)
        if message is None:  # not all of it is there yet
            return
        del self._newcomers[wire]
        match message:
            case {
                "verb": "hello",
                "node": str(name),
                "job": str(job),
                "nonce": str(theirs),
                "problems": list(problems),
                "clock": float(clock),
            }:
                known = proves(message, self._invitation.token, "agent", nonce) and NAME.fullmatch(name)
            case _:
                known = None
        if not known:
            wire.close("turned away")
            return
        answer = proof(self._invitation.token, "supervisor", theirs)
        # Less than our own time-out, so that its ranks have ended before the next attempt begins.
        wire.send("welcome", proof=answer, patience=self._timeout * 2 / 3)
        if name in self._refused:
            wire.send("refused", why=self._refused[name])
            wire.close("refused")
            return
        if name in self.nodes:
            self._lose(self.nodes[name], "its agent was started again")
        self.nodes[name] = Node(
            name, job, [str(each) for each in problems], clock_difference(clock, challenged, time.time()), wire
        )
        self._news.append(("joined", self.nodes[name]))

    def _take(self, node: Node, message: Message) -> None:
        match message:
            case {"verb": "alive"}:
                pass
            case {"verb": "asked", "signum": int(signum)}:
                node.asked = node.asked or signum
            case {"verb": "output", "text": str(text), "stderr": bool(to_stderr)}:
                self._terminal.pass_on(text.encode(errors="surrogateescape"), to_stderr)
            case _:
                node.put(message)

    def _reap(self) -> None:
        now = time.monotonic()
        for wire, (_, since, _) in list(self._newcomers.items()):
            if wire.closed or now - since > GREETING:
                wire.close("turned away")
                del self._newcomers[wire]
        for node in list(self.nodes.values()):
            if node.wire.closed:
                self._lose(node, f"its agent {node.wire.closed}")
            elif now - node.wire.heard > self._timeout:
                self._lose(node, f"no sign of life for {self._timeout:g} s (launch.node_timeout)")

    def _lose(self, node: Node, why: str) -> None:
        node.gone = why
        node.wire.close(why)
        del self.nodes[node.name]
        self._news.append(("lost", node))
