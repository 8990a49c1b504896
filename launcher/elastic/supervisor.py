"""The loop of the supervisor: one attempt after the other, on the nodes that are there."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.elastic.control_server import Hub, Node
from launcher.elastic.events import FirstStep, History
from launcher.elastic.layouts import choose_layout, layout_overrides, ranks_per_node
from launcher.elastic.node_choice import Losses, best_size, choose_nodes
from launcher.elastic.node_requests import Wishes
from launcher.elastic.remote_ranks import Team
from launcher.elastic.state_file import Report
from launcher.health.examination import examine
from launcher.health.node import clock_problem
from launcher.workers.ending import PEER_GRACE, explain, last_words, new_attempt, resume_after
from launcher.workers.output import Terminal
from launcher.workers.rank_group import POLL
from launcher.workers.run_progress import Restarts, RunState, run_state
from launcher.workers.stop import asked_to_stop, stop_ranks, stop_status
from megamoe.config import Config
from megamoe.core.exit_status import FAILED, HUNG, NO_PROGRESS, STOPPED, how_it_ended, signal_name
from megamoe.core.rank_end import EndKind
from megamoe.core.run_folder import AttemptFolder, RunFolder
from megamoe.parallel.layout import Layout

COMING = 120.0  # seconds for the agents of the allocation to come: Python from a cold network file system takes its time
SETTLED = 2.0  # seconds; nodes that come together are taken in together
PORT_TRIES = 3
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
class End:
    """The supervisor's work is done: exit status, and why the run is to be started again, if it is."""

    status: int
    again: str | None = None


@dataclass(frozen=True)
class _Ended:
    """An attempt that has ended: how, and what was done on the way."""

    team: Team
    noticed: float
    culprit: tuple[int, int] | None
    stop: bool
    change: str | None
    by_themselves: bool
    frozen: Mapping[int, list[int]]
    stepped: bool


class Supervisor:
    """Decides who works, starts attempts, watches them, and judges how they ended.

    Args:
        request: what is to be run.
        resume: ``auto``, ``none`` or a checkpoint, for the first attempt.
        hub: the control port.
        report: gets the state.
        history: gets the events.
        wishes: to the cluster.
        terminal: for what people read.
        caught: signals that ask to stop, filled while this runs.
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
        caught: list[int],
    ) -> None:
        self._request, self._resume, self._hub, self._report = request, resume, hub, report
        self._history, self._wishes, self._terminal, self._caught = history, wishes, terminal, caught
        self._settings, self._limits = request.settings, request.settings.launch
        self._run_dir = request.settings.run.folder
        # By the clock of the file system, with which the times of checkpoints are compared.
        self._launched = RunFolder(self._run_dir).launch.supervisor.stat().st_mtime
        self._restarts, self._losses = Restarts(self._limits), Losses(self._limits)
        self._port_tries = 0
        self._by_agents: list[int] = []  # what of the caught signals only reached agents
        self._came: set[str] = set()
        self._before: list[str] = []
        self._at_work: list[Node] = []
        self._measured: set[Node] = set()

    def run(self, expected: int, kind: str, since: float) -> End:
        """One attempt after the other; the first waits for ``expected`` agents."""
        while True:
            nodes = self._gather(expected, kind)
            if self._caught:
                return self._stop_between()
            if nodes is None:
                there = len(self._hub.nodes)
                return End(FAILED, f"only {there} nodes are left, and the run needs {self._request.sizes[0]}")
            if not self._sound(nodes):
                continue
            if kind == "lost":
                kind = self._how_replaced(nodes)
            ended = self._attempt(nodes, kind, since)
            state = run_state(self._run_dir, self._launched)
            self._resume = resume_after(self._resume, state.checkpoint)
            verdict = self._judge(ended, state)
            if isinstance(verdict, End):
                return verdict
            kind, since = verdict, ended.noticed

    def _gather(self, expected: int, kind: str) -> list[Node] | None:
        """The nodes of the next attempt; None when too few came. Also ends when a signal was caught.

        The first attempt waits for all nodes that it may have, the others for as many as worked before, and after
        ``launch.node_wait`` takes what is there.
        """
        sizes, began = self._request.sizes, time.monotonic()
        first = not self._before
        self._at_work = []
        self._report.state("starting" if first else "waiting")
        while not self._caught:
            self._look(wish=not first)
            waited = time.monotonic() - began
            usable = self._usable()
            size = best_size(sizes, len(usable))
            wait = COMING if first and len(self._came) < expected else self._limits.node_wait
            goal = sizes[-1] if first else min(len(self._before), sizes[-1])
            if size is not None and (size >= goal or waited >= wait):
                return choose_nodes(usable, self._before, size)
            if size is None and waited >= max(wait, self._limits.node_timeout):
                return None
            self._hub.poll(POLL)
        return None

    def _sound(self, nodes: list[Node]) -> bool:
        """Whether these nodes are fit to work together; those that are not are excluded."""
        health = self._limits.health
        if health.check == "off":
            return True
        # With those that stand by: one that takes a lost node's place is not measured then.
        wanted = [*nodes, *(node for node in self._usable() if node not in nodes)]
        measure = health.check == "full" and not self._measured.issuperset(nodes)
        self._report.state("checking")
        found = examine(self._hub, wanted if measure else nodes, self._limits, measure, lambda: bool(self._caught))
        for line in found.told:
            self._terminal.say(line)
        if found.measured:
            self._measured.update(wanted)
            names = [node.name for node in wanted]
            self._history.event("measured", nodes=names, all_reduce_gbit=found.all_reduce, told=found.told)
        for node, why in found.bad:
            if node.name in self._hub.nodes:
                self._exclude(node.name, why)
        return found.complete and not found.bad

    def _attempt(self, nodes: list[Node], kind: str, since: float) -> _Ended:
        layout = choose_layout(self._settings, len(nodes) * ranks_per_node(self._settings))
        assert layout is not None, "team_sizes has found one"
        folder = new_attempt(self._run_dir)
        self._before, self._at_work = [node.name for node in nodes], nodes
        overrides = [*self._request.overrides, *layout_overrides(layout)]
        first_step = FirstStep(self._run_dir)
        self._announce(folder, nodes, layout, kind, since)
        with Team(
            self._hub,
            nodes,
            ranks_per_node(self._settings),
            self._request.config_path,
            self._resume,
            overrides,
            folder,
            bind=self._limits.bind == "auto",
        ) as team:
            self._report.state("running", folder.number, layout, team, self._resume)
            while team.running() and not self._caught and not team.lost() and self._change(team) is None:
                team.pause(POLL)
                self._look(wish=True)
                if first_step.came():
                    self._history.event("step", step=run_state(self._run_dir, 0).reached)
            noticed = time.time()
            culprit = team.culprit() if not team.lost() else None
            change = self._change(team)
            asked = asked_to_stop(team)
            stop = bool(self._caught) or (asked and change is None)
            if culprit is not None and not asked:
                change = None
            by_themselves = False
            frozen: Mapping[int, list[int]] = {}
            if team.lost():
                pass  # nobody can save without the others: all ranks are killed on the way out
            elif stop or change is not None:
                if stop:
                    self._note_stop()
                self._report.state("stopping", folder.number, layout, team, self._resume)
                grace = self._limits.stop_grace + PEER_GRACE
                why = None if stop or change is None else CHANGES[change]
                by_themselves = stop_ranks(team, self._caught, grace, self._terminal, why)
            elif culprit is not None:
                frozen = last_words(team, culprit[1])
        self._history.event("ended", statuses=dict(team.ended()))
        return _Ended(team, noticed, culprit, stop, change, by_themselves, frozen, first_step.done)

    def _judge(self, ended: _Ended, state: RunState) -> End | str:
        """What comes after an attempt: the end, or another one of this kind."""
        team, statuses = ended.team, ended.team.ended().values()
        if ended.stop:
            status, words = stop_status(statuses, self._caught, ended.by_themselves, state)
            return self._stopped(status, words)
        if lost := team.lost():  # perhaps only found out while its ranks were to be ended: they are not to blame
            return self._judge_losses([node.name for node in lost], state)
        if not any(statuses):
            return End(0)
        if ended.change is not None:
            if not ended.by_themselves:
                self._terminal.say("not all ranks have saved in time (launch.stop_grace): back to the last checkpoint")
            return ended.change
        assert ended.culprit is not None
        return self._judge_failure(ended, ended.culprit, state)

    def _judge_losses(self, names: list[str], state: RunState) -> End | str:
        for name in self._losses.note(names, state):
            self._exclude(name, f"lost {self._limits.max_restarts + 1} times since the last checkpoint")
        if why := self._losses.stuck():
            self._terminal.say(why)
            return End(NO_PROGRESS)
        return "lost"

    def _judge_failure(self, ended: _Ended, culprit: tuple[int, int], state: RunState) -> End | str:
        rank, status = culprit
        self._history.event("failed", node=self._node_of(ended.team, rank), rank=rank, how=how_it_ended(status))
        explain(ended.team, culprit, ended.frozen, self._terminal)
        first = ended.team.end_of(0)
        taken = first is not None and first.kind is EndKind.PORT_TAKEN
        if taken and not ended.stepped and self._port_tries < PORT_TRIES:
            self._port_tries += 1
            self._terminal.say("somebody took the port of rank 0: once more with another")
            return "port"
        what = f"all {len(ended.team.logs)} ranks with --resume {self._resume}"
        given_up = self._restarts.after(state, culprit, what, self._run_dir, self._terminal)
        if given_up is not None:
            return End(given_up)
        return "hang" if status == HUNG else "rank"

    def _note_stop(self) -> None:
        self._history.event("stop", signal=signal_name(self._caught[0]) if self._caught else None)

    def _stopped(self, status: int, words: str) -> End:
        """Somebody has asked to stop: for good, or the run goes on later."""
        if status == 0:
            return End(0)
        if (again := self._why_again()) is not None:
            self._terminal.say(words)
            return End(status, again)
        self._terminal.say(f"{words}; go on with: megamoe launch resume {self._run_dir}")
        return End(status)

    def _why_again(self) -> str | None:
        """Why the run is to be started again after the signals that came; None if it is not.

        SIGUSR1 is a time limit. SIGTERM for the agents alone is how SLURM announces preemption: it gives the job its
        nodes back only if it still runs at the end of the grace, or asks for it. SIGTERM for this process means it: the
        run was cancelled, or it was requeued, and is started again without our doing.
        """
        deadline = time.monotonic() + SAME_SIGNAL
        while not (ours := Counter(self._caught) - Counter(self._by_agents)) and time.monotonic() < deadline:
            self._hub.poll(POLL)
            self._look(wish=False)
        if signal.SIGINT in ours:
            return None
        if signal.SIGUSR1 in self._caught:
            return signal_name(signal.SIGUSR1)
        return None if ours or signal.SIGTERM not in self._by_agents else "SIGTERM for the nodes alone (preemption)"

    def _stop_between(self) -> End:
        self._note_stop()
        state = run_state(self._run_dir, self._launched)
        return self._stopped(
            STOPPED, f"stopped at step {state.reached} between two attempts; no step that was saved is lost"
        )

    def _change(self, team: Team) -> str | None:
        """Why the ranks should save and start again on other nodes: ``leave``, ``grow``, or not at all."""
        if any(node.asked for node in team.nodes):
            return "leave"
        others = [node for node in self._usable() if node not in team.nodes]
        if not others or time.time() - max(node.joined for node in others) < SETTLED:
            return None
        size = best_size(self._request.sizes, len(self._usable()))
        return "grow" if size is not None and size > len(team.nodes) else None

    def _usable(self) -> list[Node]:
        return [node for node in self._hub.nodes.values() if not node.asked]

    def _look(self, wish: bool) -> None:
        """Take note of who has come and gone, and ask the cluster for what is missing."""
        news, self._hub.news[:] = list(self._hub.news), []
        for what, node in news:
            self._came.add(node.name)
            self._history.event(what, node=node.name, job=node.job, why=node.gone)
            if what == "lost":
                self._terminal.say(f"node {node.name} is lost: {node.gone}")
            elif problems := [*node.problems, *filter(None, [clock_problem(node.name, node.clock, self._limits)])]:
                self._exclude(node.name, "; ".join(map(str, problems)))
        for node in list(self._hub.nodes.values()):
            if node.asked and node.job == self._report.job:
                self._by_agents.append(node.asked)  # the whole allocation is to stop
                self._caught.append(node.asked)
                node.asked = 0
            elif node.asked and node not in self._at_work:
                self._hub.dismiss(node, f"its job was told to stop ({signal_name(node.asked)})")
        if wish:
            self._wishes.nodes(max(0, self._limits.nodes + self._limits.spares - len(self._usable())))
        if news:
            self._report.refresh()

    def _exclude(self, name: str, why: str) -> None:
        self._terminal.say(f"node {name} is not used any more: {why}")
        self._history.event("excluded", node=name, why=why)
        self._hub.refuse(name, why)
        self._wishes.exclude(name, why)

    def _how_replaced(self, nodes: list[Node]) -> str:
        names = {node.name for node in nodes}
        if len(names) < len(self._before):
            return "shrink"
        return "back" if names == set(self._before) else "spare"

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

    def _node_of(self, team: Team, rank: int) -> str:
        return next(node.name for node in team.nodes if rank in team.of_node(node))
