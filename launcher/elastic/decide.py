"""What the supervisor does next, as rules alone: no clock, no network, no processes, no files.

``decide(state, event)`` returns the next state and one action. The loop in :mod:`launcher.elastic.supervisor` turns what
happens into events and carries the actions out.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace

from launcher.elastic.node_choice import best_size, choose_nodes
from launcher.elastic.steps import (
    AttemptEnded,
    Came,
    Candidate,
    Close,
    Decision,
    Event,
    Examine,
    Examined,
    Finish,
    Gather,
    Gathering,
    Halt,
    Halted,
    Settle,
    Settled,
    Start,
    State,
    StopBetween,
    Told,
    Wait,
    Working,
)
from launcher.workers.run_progress import RunState
from launcher.workers.stop import stop_status
from megamoe.core.exit_status import FAILED, HUNG, NO_PROGRESS, STOPPED, signal_name

COMING = 120.0  # seconds for the agents of the allocation to come: Python from a cold network file system takes its time
SETTLED = 2.0  # seconds; nodes that come together are taken in together
PORT_TRIES = 3


def decide(state: State, event: Event) -> Decision:
    """Return what follows from ``event``."""
    match event:
        case Told():
            return Decision(replace(state, signals=(*state.signals, event)))
        case Came(name):
            return Decision(replace(state, came=state.came | {name}))
        case Gathering():
            return _gathering(state, event)
        case Examined():
            return _examined(state, event)
        case Working(running, lost, nodes, now):
            well = running and not lost and not state.signals and change_of(state, nodes, now) is None
            return Decision(state, Wait() if well else Halt())
        case Halted():
            return Decision(state, _close(state, event))
        case AttemptEnded():
            return _attempt_ended(state, event)
        case Settled(status, words):
            again = why_again(state.signals)
            if again is None:
                words = f"{words}; go on with: megamoe launch resume {state.rules.run_dir}"
            return Decision(state, Finish(status, again), say=(words,))


def change_of(state: State, nodes: Sequence[Candidate], now: float) -> str | None:
    """Say why the ranks should save and start again on other nodes: ``leave``, ``grow``, or None."""
    at_work = [node for node in nodes if node.works]
    if any(node.asked for node in at_work):
        return "leave"
    others = [node for node in usable(nodes) if not node.works]
    if not others or now - max(node.joined for node in others) < SETTLED:
        return None
    size = best_size(state.rules.sizes, len(usable(nodes)))
    return "grow" if size is not None and size > len(state.before) else None


def usable(nodes: Sequence[Candidate]) -> list[Candidate]:
    """Return the nodes that are there and were not told to leave."""
    return [node for node in nodes if not node.asked and not node.gone]


def why_again(signals: Sequence[Told]) -> str | None:
    """Say why the run is to be started again after these signals; None if it is not.

    SIGUSR1 is a time limit. SIGTERM for the agents alone is how SLURM announces preemption: it gives the job its nodes
    back only if it still runs at the end of the grace, or asks for it. SIGTERM for the supervisor means it: the run was
    cancelled, or it was requeued, and is started again without our doing.
    """
    ours = {told.number for told in signals if not told.by_agent}
    numbers = {told.number for told in signals}
    if signal.SIGINT in ours:
        return None
    if signal.SIGUSR1 in numbers:
        return signal_name(signal.SIGUSR1)
    return None if ours or signal.SIGTERM not in numbers else "SIGTERM for the nodes alone (preemption)"


def _gathering(state: State, event: Gathering) -> Decision:
    """Wait for the nodes of the next attempt.

    The first attempt waits for all nodes that it may have, the others for as many as worked before; after
    ``launch.node_wait`` each takes what is there.
    """
    if state.signals:
        return Decision(state, StopBetween())
    rules, first = state.rules, not state.before
    there = usable(event.nodes)
    size = best_size(rules.sizes, len(there))
    wait = COMING if first and len(state.came) < rules.expected else rules.limits.node_wait
    goal = rules.sizes[-1] if first else min(len(state.before), rules.sizes[-1])
    if size is not None and (size >= goal or event.waited >= wait):
        return Decision(state, Examine(tuple(node.name for node in choose_nodes(there, state.before, size))))
    if size is None and event.waited >= max(wait, rules.limits.node_timeout):
        why = f"only {len(event.nodes)} nodes are left, and the run needs {rules.sizes[0]}"
        return Decision(state, Finish(FAILED, why))
    return Decision(state)


def _examined(state: State, event: Examined) -> Decision:
    if not event.sound:
        return Decision(state, Gather(), exclude=event.bad)
    kind = state.kind
    if kind == "lost":
        if len(event.names) < len(state.before):
            kind = "shrink"
        else:
            kind = "back" if set(event.names) == set(state.before) else "spare"
    return Decision(replace(state, before=event.names, kind=kind), Start(event.names, kind))


def _close(state: State, event: Halted) -> Close:
    change = change_of(state, event.nodes, event.now)
    stop = bool(state.signals) or (event.asked and change is None)
    if event.culprit is not None and not event.asked:
        change = None
    if event.lost:
        return Close(stop, change)  # nobody can save without the others
    save = stop or change is not None
    return Close(stop, change, save, last_words=not save and event.culprit is not None)


def _attempt_ended(state: State, event: AttemptEnded) -> Decision:
    if event.close.stop:
        numbers = [told.number for told in state.signals]
        status, words = stop_status(event.statuses, numbers, event.by_themselves, event.run)
        return Decision(state, Settle(status, words) if status else Finish(0))
    if event.lost:  # perhaps only found out while the ranks were to be ended: they are not to blame
        return _nodes_lost(state, event)
    if not any(event.statuses):
        return Decision(state, Finish(0))
    if event.close.change is not None:
        late = "not all ranks have saved in time (launch.stop_grace): back to the last checkpoint"
        return Decision(replace(state, kind=event.close.change), Gather(), say=() if event.by_themselves else (late,))
    assert event.culprit is not None, "a rank has failed"
    return _rank_failed(state, event, event.culprit)


def _nodes_lost(state: State, event: AttemptEnded) -> Decision:
    losses = state.losses.after(event.lost, event.run)
    often = f"lost {state.rules.limits.max_restarts + 1} times since the last checkpoint"
    exclude = tuple((name, often) for name in event.lost if losses.too_often(name))
    state = replace(state, losses=losses, kind="lost")
    if why := losses.stuck():
        return Decision(state, Finish(NO_PROGRESS), exclude=exclude, say=(why,))
    return Decision(state, Gather(), exclude=exclude)


def _rank_failed(state: State, event: AttemptEnded, culprit: tuple[int, int]) -> Decision:
    if event.port_taken and state.port_tries < PORT_TRIES:
        again = replace(state, kind="port", port_tries=state.port_tries + 1)
        return Decision(again, Gather(), culprit, say=("somebody took the port of rank 0: once more with another",))
    what = f"all {len(event.statuses)} ranks with --resume {event.resume}"
    verdict = state.restarts.after(event.run, culprit, what, state.rules.run_dir)
    state = replace(state, restarts=verdict.restarts, kind="hang" if culprit[1] == HUNG else "rank")
    action = Gather() if verdict.status is None else Finish(verdict.status)
    return Decision(state, action, culprit, say=(verdict.words,) if verdict.words else ())


def stopped_between(run: RunState) -> Settle:
    """Return what follows a stop while no ranks were at work."""
    return Settle(STOPPED, f"stopped at step {run.reached} between two attempts; no step that was saved is lost")
