"""The loop of the supervisor: turns what happens to a run into events, and carries out what is decided.

What follows from an event stands in :mod:`launcher.elastic.decide`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.elastic.cluster import Wishes
from launcher.elastic.control_server import Hub, Node
from launcher.elastic.decide import decide, stopped_between
from launcher.elastic.events import FirstStep, History
from launcher.elastic.layouts import choose_layout, layout_overrides, ranks_per_node
from launcher.elastic.node_choice import Losses
from launcher.elastic.outlook import Outlook, Report
from launcher.elastic.remote_ranks import Team
from launcher.elastic.steps import (
    Action,
    AttemptEnded,
    Close,
    Decision,
    Event,
    Examine,
    Examined,
    Finish,
    Gather,
    Gathering,
    Halted,
    Rules,
    Settle,
    Settled,
    Start,
    State,
    StopBetween,
    Told,
    Wait,
    Working,
)
from launcher.health.examination import examine
from launcher.workers.ending import PEER_GRACE, explain, last_words, new_attempt, resume_after
from launcher.workers.output import Terminal
from launcher.workers.rank_group import POLL
from launcher.workers.run_progress import Restarts, run_state
from launcher.workers.stop import asked_to_stop, stop_ranks, stop_words
from launcher.workers.stop_signals import StopSignals
from megamoe.config import Config
from megamoe.core.exit_status import how_it_ended, signal_name
from megamoe.core.rank_end import EndKind
from megamoe.core.run_folder import AttemptFolder, RunFolder
from megamoe.parallel.layout import Layout

SAME_SIGNAL = 2.0  # seconds within which a signal for the whole job reaches its agents and its supervisor
CHANGES = {"grow": "nodes have come", "leave": "a node is taken away"}


@dataclass(frozen=True)
class Request:
    """What is to be run: config file, ``KEY=VALUE`` settings, what they amount to, and the numbers of nodes it can have."""

    config_path: Path
    overrides: Sequence[str]
    settings: Config
    sizes: Sequence[int]


@dataclass(frozen=True)
class _Attempt:
    """An attempt that has ended."""

    team: Team
    noticed: float
    culprit: tuple[int, int] | None
    close: Close
    by_themselves: bool
    frozen: Mapping[int, list[int]]
    stepped: bool


class Supervisor:
    """Gathers nodes, starts attempts, watches them and ends them, as :func:`launcher.elastic.decide.decide` says.

    Args:
        request: what is to be run.
        resume: ``auto``, ``none`` or a checkpoint, for the first attempt.
        hub: the control port.
        report: gets the state.
        history: gets the events.
        wishes: to the cluster.
        terminal: for what people read.
        caught: signals to this process that ask to stop.
    """

    def __init__(
        self,
        request: Request,
        resume: str,
        hub: Hub,
        report: Report,
        history: History,
        wishes: Wishes,
        terminal: Terminal,
        caught: StopSignals,
    ) -> None:
        self._request, self._resume, self._hub, self._report = request, resume, hub, report
        self._history, self._terminal, self._caught = history, terminal, caught
        self._settings, self._limits = request.settings, request.settings.launch
        self._run_dir = request.settings.run.folder
        # Read from the clock of the file system, since it is compared with the times of checkpoints.
        self._launched = RunFolder(self._run_dir).launch.supervisor.stat().st_mtime
        self._outlook = Outlook(hub, report, history, wishes, terminal, self._limits)
        self._measured: set[Node] = set()

    def run(self, expected: int, kind: str, since: float) -> Finish:
        """Run one attempt after the other until the run is over.

        Args:
            expected: agents that the cluster has started.
            kind: why the first attempt begins.
            since: when what led to it was noticed.
        """
        rules = Rules(self._limits, self._request.sizes, expected, self._run_dir)
        self._state = State(rules, kind, Restarts(self._limits), Losses(self._limits))
        self._seen = 0  # of the signals that were caught
        action: Action = Gather()
        chosen: list[Node] = []
        while True:
            match action:
                case Finish():
                    return action
                case Examine(names):
                    chosen = [self._hub.nodes[name] for name in names]
                    action = self._examine(chosen)
                case Start(_, kind):
                    attempt = self._attempt(chosen, kind, since)  # one that is lost already ends it at once
                    since = attempt.noticed
                    action = self._judge(attempt)
                case StopBetween():
                    self._note_stop()
                    action = stopped_between(run_state(self._run_dir, self._launched))
                case Settle(status, words):
                    self._await_same_signal()
                    action = self._decide(Settled(status, words))
                case _:
                    action = self._gather()

    def _decide(self, event: Event) -> Action:
        """Take in the signals that have come, then ``event``."""
        return self._carry_out(self._ask(event))

    def _ask(self, event: Event) -> Decision:
        for number in self._caught.received[self._seen :]:
            self._seen += 1
            self._state = decide(self._state, Told(number)).state
        decision = decide(self._state, event)
        self._state = decision.state
        return decision

    def _carry_out(self, decision: Decision) -> Action:
        for name, why in decision.exclude:
            self._outlook.exclude(name, why)
        for line in decision.say:
            self._terminal.say(line)
        return decision.action

    def _gather(self) -> Action:
        began = time.monotonic()
        first = not self._state.before
        self._outlook.at_work = []
        self._report.state("starting" if first else "waiting")
        while True:
            self._look(wish=not first)
            action = self._decide(Gathering(time.monotonic() - began, self._outlook.candidates()))
            if not isinstance(action, Wait):
                return action
            self._hub.poll(POLL)

    def _examine(self, nodes: list[Node]) -> Action:
        """Check whether these nodes are fit to work together."""
        health, names = self._limits.health, tuple(node.name for node in nodes)
        if health.check == "off":
            return self._decide(Examined(names, sound=True))
        # Nodes that stand by are measured as well, so that one can take a lost node's place without a test.
        wanted = [*nodes, *(node for node in self._hub.nodes.values() if not node.asked and node not in nodes)]
        measure = health.check == "full" and not self._measured.issuperset(nodes)
        self._report.state("checking")
        found = examine(self._hub, wanted if measure else nodes, self._limits, measure, lambda: bool(self._caught))
        for line in found.told:
            self._terminal.say(line)
        if found.measured:
            self._measured.update(wanted)
            measured = [node.name for node in wanted]
            self._history.event("measured", nodes=measured, all_reduce_gbit=found.all_reduce, told=found.told)
        bad = tuple((node.name, why) for node, why in found.bad if node.name in self._hub.nodes)
        return self._decide(Examined(names, found.complete and not found.bad, bad))

    def _attempt(self, nodes: list[Node], kind: str, since: float) -> _Attempt:
        layout = choose_layout(self._settings, len(nodes) * ranks_per_node(self._settings.launch))
        assert layout is not None, "team_sizes has found one"
        folder = new_attempt(self._run_dir)
        self._outlook.at_work = nodes
        overrides = [*self._request.overrides, *layout_overrides(layout)]
        first_step = FirstStep(self._run_dir)
        self._announce(folder, nodes, layout, kind, since)
        with Team(
            self._hub,
            nodes,
            ranks_per_node(self._settings.launch),
            self._request.config_path,
            self._resume,
            overrides,
            folder,
            bind=self._limits.bind == "auto",
        ) as team:
            self._report.state("running", folder.number, layout, team, self._resume)
            while isinstance(self._decide(self._working(team)), Wait):
                team.pause(POLL)
                self._look(wish=True)
                if first_step.came():
                    self._history.event("step", step=run_state(self._run_dir, 0).reached)
            noticed = time.time()
            culprit = team.culprit() if not team.lost() else None
            halted = Halted(culprit, bool(team.lost()), asked_to_stop(team), self._outlook.candidates(), time.time())
            close = self._decide(halted)
            assert isinstance(close, Close)
            by_themselves = False
            frozen: Mapping[int, list[int]] = {}
            if close.save:
                self._report.state("stopping", folder.number, layout, team, self._resume)
                by_themselves = self._stop(team, close)
            elif close.last_words and culprit is not None:
                frozen = last_words(team, culprit[1])
        self._history.event("ended", statuses=dict(team.ended()))
        return _Attempt(team, noticed, culprit, close, by_themselves, frozen, first_step.done)

    def _working(self, team: Team) -> Working:
        return Working(team.running(), bool(team.lost()), self._outlook.candidates(), time.time())

    def _stop(self, team: Team, close: Close) -> bool:
        """Have the ranks save and end; return whether all have ended by themselves."""
        if close.stop:
            self._note_stop()
            self._terminal.say(stop_words(self._signals()))
        elif close.change is not None:
            self._terminal.say(f"{CHANGES[close.change]}: the ranks save and stop, to go on with other nodes")
        return stop_ranks(team, self._signals, self._limits.stop_grace + PEER_GRACE)

    def _judge(self, attempt: _Attempt) -> Action:
        run = run_state(self._run_dir, self._launched)
        self._resume = resume_after(self._resume, run.checkpoint)
        team, first = attempt.team, attempt.team.end_of(0)
        decision = self._ask(
            AttemptEnded(
                close=attempt.close,
                statuses=tuple(team.ended().values()),
                lost=tuple(node.name for node in team.lost()),
                culprit=attempt.culprit,
                by_themselves=attempt.by_themselves,
                port_taken=not attempt.stepped and first is not None and first.kind is EndKind.PORT_TAKEN,
                run=run,
                resume=self._resume,
            )
        )
        if decision.blame is not None:
            rank, status = decision.blame
            node = next(node.name for node in team.nodes if rank in team.of_node(node))
            self._history.event("failed", node=node, rank=rank, how=how_it_ended(status))
            explain(team, decision.blame, attempt.frozen, self._terminal)
        return self._carry_out(decision)

    def _signals(self) -> list[int]:
        """Return the signals to this process and to agents that ask the run to stop, oldest first."""
        return [*(told.number for told in self._state.signals), *self._caught.received[self._seen :]]

    def _note_stop(self) -> None:
        signals = self._signals()
        self._history.event("stop", signal=signal_name(signals[0]) if signals else None)

    def _await_same_signal(self) -> None:
        """Wait for a signal to the whole job, which may have reached the agents before this process."""
        deadline = time.monotonic() + SAME_SIGNAL
        while not self._caught and time.monotonic() < deadline:
            self._hub.poll(POLL)
            self._look(wish=False)

    def _look(self, wish: bool) -> None:
        for event in self._outlook.look(wish):
            self._ask(event)

    def _announce(self, folder: AttemptFolder, nodes: list[Node], layout: Layout, kind: str, since: float) -> None:
        names = [node.name for node in nodes]
        self._terminal.say(f"{folder.name} ({kind}): {', '.join(names)}; {layout.describe()}; --resume {self._resume}")
        self._history.event(
            "attempt",
            attempt=folder.number,
            kind=kind,
            since=since,
            nodes=names,
            ranks=layout.world_size,
            layout=layout.describe(),
            resume=self._resume,
        )
