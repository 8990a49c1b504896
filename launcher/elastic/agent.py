"""The agent of a node: starts, signals and ends the node's ranks as the supervisor tells it.

The agent obeys a handful of verbs and nothing else. What it starts is its own command with a config's path, settings
and numbers. When the supervisor is gone it ends its ranks at once: nobody would restart them, and another attempt may
begin elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launcher.elastic.events import is_over
from launcher.elastic.invitation import Invitation, Pulse, read_invitation
from launcher.elastic.messages import BEAT, Message, Wire, new_nonce, proof, proves
from launcher.health.probe import Probe
from launcher.workers.guard import Guard
from launcher.workers.placement import Place, environment, numa_nodes, share_cores
from launcher.workers.processes import Ranks
from launcher.workers.rank_group import POLL
from launcher.workers.stop_signals import StopSignals, caught_signals
from megamoe.core.exit_status import FAILED
from megamoe.core.log import say
from megamoe.core.run_folder import RunFolder

PATIENCE = 300.0  # seconds to wait for a supervisor, also for the successor of a dead one
KNOCK = 3.0  # seconds to reach one of the supervisor's addresses
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
PIECE = 8192  # bytes of rank 0's output in one message; as JSON they are at most six times as many


def run_agent(
    run_dir: Path,
    node: str,
    job: str,
    *,
    command: Sequence[str] = (sys.executable, "-m", "megamoe"),
    checks: Callable[[], Sequence[str]] = tuple,
    orphaned: Callable[[str], None] | None = None,
    patience: float = PATIENCE,
) -> int:
    """Serve the supervisor named in RUN/launch/supervisor.json until it says that the run is over.

    Args:
        run_dir: the run's folder, shared with the supervisor.
        node: name of this node; an agent of the same name takes the place of an earlier one.
        job: name of the allocation that this agent runs in (``Cluster.job`` for those of the main one).
        command: what to start in place of this Python's ``megamoe``.
        checks: looks at the node before it offers itself and before each attempt; the problems found, one line each,
            exclude it from the run.
        orphaned: has the run started again, since its supervisor is dead; called by one of the agents left, with why.
        patience: seconds to wait for a supervisor, at first and after one is lost.

    Returns:
        Exit status: 0 dismissed by the supervisor, or the run is over; 1 there is no supervisor, or it refused this node.

    Raises:
        UserError: RUN/launch/supervisor.json belongs to another user.
    """
    run_dir = run_dir.absolute()
    agent = _Agent(run_dir, node, job, command, checks)
    with Guard() as guard, caught_signals() as caught:
        known: Invitation | None = None
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and not caught:
            invitation = read_invitation(run_dir)
            if invitation is None and (known is not None or is_over(run_dir)):
                _say(node, "the run is over")
                return 0
            if invitation is None or (wire := agent.join(invitation)) is None:
                time.sleep(0.2)
                continue
            known = invitation
            verdict = agent.serve(wire, guard, caught)
            if verdict is not None:
                return verdict
            deadline = time.monotonic() + patience
            _say(node, f"the supervisor {wire.closed}; its ranks here are ended")
            if _is_dead(run_dir, invitation, agent.tolerance):
                why = f"the supervisor on {invitation.hosts[0]} is dead, says {node}"
                if _is_mine(run_dir, invitation, node) and orphaned is not None:
                    _say(node, f"{why}: the run is to be started again")
                    orphaned(why)
                if job == invitation.job:
                    return FAILED
    _say(node, "no supervisor: this agent ends")
    return FAILED


class _Agent:
    """Serves one supervisor after the other."""

    def __init__(
        self, run_dir: Path, node: str, job: str, command: Sequence[str], checks: Callable[[], Sequence[str]]
    ) -> None:
        self._run_dir, self._node, self._job, self._command = run_dir, node, job, command
        self._problems = list(checks())
        self._probe = Probe(checks, RunFolder(run_dir).launch.health_log(node))
        self._ranks: Ranks | None = None
        self._reported: set[int] = set()
        self._attempt = 0
        self._port: socket.socket | None = None
        self.tolerance = 0.0

    def join(self, invitation: Invitation) -> Wire | None:
        """Join the supervisor; None when it cannot be reached, or is not the one that wrote the invitation."""
        for host in invitation.hosts:
            try:
                wire = Wire(socket.create_connection((host, invitation.port), timeout=KNOCK))
            except OSError:
                continue
            first = wire.first(KNOCK)
            if first is not None and isinstance(theirs := first.get("nonce"), str):
                nonce = new_nonce()
                answer = proof(invitation.token, "agent", theirs)
                wire.send(
                    "hello",
                    proof=answer,
                    nonce=nonce,
                    node=self._node,
                    job=self._job,
                    problems=self._problems,
                    clock=time.time(),
                )
                welcome = wire.first(KNOCK)
                if welcome is not None and proves(welcome, invitation.token, "supervisor", nonce):
                    self.tolerance = float(welcome["patience"])
                    return wire
            wire.close("no supervisor of this run")
        return None

    def serve(self, wire: Wire, guard: Guard, caught: StopSignals) -> int | None:
        """Obey the supervisor until it dismisses this agent; return the exit status, None when the supervisor is lost."""
        asked, beat = 0, 0.0
        try:
            while not wire.closed:
                for message in wire.receive(POLL):
                    if message["verb"] == "bye":
                        return 0
                    if message["verb"] == "refused":
                        _say(self._node, f"not wanted: {message.get('why')}")
                        return FAILED
                    self._obey(message, wire, guard)
                for signum in caught.received[asked:]:
                    wire.send("asked", signum=signum)
                    asked += 1
                self._report(wire)
                now = time.monotonic()
                if now - wire.heard > self.tolerance:
                    wire.close(f"gave no sign of life for {self.tolerance:g} s")
                if now - beat > BEAT:
                    beat = now
                    wire.send("alive")
            return None
        finally:
            self._end()
            self._probe.close()
            wire.close("left")

    def _obey(self, message: Message, wire: Wire, guard: Guard) -> None:
        match message:
            case {"verb": "port"}:
                wire.send("port", port=self._reserve_port())
            case {"verb": "start", "attempt": int(attempt)}:
                self._attempt = attempt
                self._start(message, wire, guard)
            case {"verb": "signal", "signum": int(signum)} if signum in SIGNALS and self._ranks is not None:
                self._ranks.signal(signum)
            case {"verb": "meet"}:
                self._probe.meet(message, wire)
            case {"verb": "measure"}:
                self._probe.measure(message, wire)
            case {"verb": "frozen"} if self._ranks is not None:
                wire.send("frozen", attempt=self._attempt, processes=self._ranks.frozen())
            case {"verb": "end", "attempt": int(attempt)}:
                self._end()
                wire.send("idle", attempt=attempt)

    def _start(self, message: Message, wire: Wire, guard: Guard) -> None:
        self._end()
        self._probe.close()
        place = Place(**message["place"])
        arguments = [*self._command, "train", message["config"], "--resume", message["resume"], *message["overrides"]]
        folder = RunFolder(self._run_dir).attempt(self._attempt)
        numbers = range(place.first, place.first + place.ranks)
        mine = os.sched_getaffinity(0)
        shares = share_cores(mine, place.ranks, numa_nodes()) if message["bind"] else None
        cores = [len(share) for share in shares] if shares else [len(mine) // place.ranks] * place.ranks
        # Rank 0 draws no bar into a job's log.
        base = os.environ | {"MEGAMOE_TERMINAL": "0"}
        variables = {rank: environment(base, place, local, cores[local]) for local, rank in enumerate(numbers)}
        try:
            os.chdir(message["workdir"])  # paths in the config may be relative
            # The supervisor made it, but this node's view of the shared file system may lag.
            folder.path.mkdir(parents=True, exist_ok=True)
            cpus = dict(zip(numbers, shares, strict=True)) if shares else None
            self._ranks = Ranks(arguments, variables, folder, _Passed(wire), guard, cpus)
        except OSError as error:
            _say(self._node, f"cannot start the ranks: {error}")
            for rank in numbers:
                wire.send("ended", attempt=self._attempt, rank=rank, status=FAILED)
            return
        wire.send("started", attempt=self._attempt, pids=self._ranks.pids)

    def _report(self, wire: Wire) -> None:
        if self._ranks is not None:
            for rank, status in self._ranks.ended().items():
                if rank not in self._reported:
                    self._reported.add(rank)
                    wire.send("ended", attempt=self._attempt, rank=rank, status=status)

    def _end(self) -> None:
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None
        self._reported = set()

    def _reserve_port(self) -> int:
        """Reserve a port for rank 0, which nobody else gets before rank 0 listens there.

        It stays bound here without being listened on. Rank 0 may still bind it, as both set SO_REUSEADDR, while the
        system gives it to no other process that asks for any port.
        """
        if self._port is not None:
            self._port.close()
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind(("", 0))
        number: int = self._port.getsockname()[1]
        return number


class _Passed:
    """Sends rank 0's output to the supervisor's terminal."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def pass_on(self, data: bytes, to_stderr: bool) -> None:
        """Send it in pieces, byte for byte."""
        for start in range(0, len(data), PIECE):
            text = data[start : start + PIECE].decode(errors="surrogateescape")
            self._wire.send("output", text=text, stderr=to_stderr)


def _is_dead(run_dir: Path, invitation: Invitation, wait: float) -> bool:
    """Return whether the supervisor's pulse stops for ``wait`` seconds; if it goes on, only the network to it is cut."""
    pulse = Pulse(run_dir)
    last, since = pulse.read(), time.monotonic()
    while time.monotonic() - since < wait:
        time.sleep(min(1.0, wait / 4))
        if read_invitation(run_dir) != invitation or pulse.read() != last:
            return False
    return True


def _is_mine(run_dir: Path, invitation: Invitation, node: str) -> bool:
    """Return whether this agent is the first to claim the right to act for all.

    Not simply the one with the lowest name: that is most often on the host that died with the supervisor.
    """
    path = RunFolder(run_dir).launch.orphaned(hashlib.sha256(invitation.token.encode()).hexdigest()[:8])
    try:
        with path.open("x") as file:
            file.write(f"{node}\n")
    except FileExistsError:
        return False
    return True


def _say(node: str, text: str) -> None:
    say(f"agent on {node}: {text}")
