"""The supervisor's state, events and actions, which :mod:`launcher.elastic.decide` connects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.elastic.node_choice import Losses
from launcher.workers.run_progress import Restarts, RunState
from megamoe.config.launch import LaunchConfig


@dataclass(frozen=True)
class Rules:
    """What stays the same for the whole run.

    Attributes:
        limits: how often to restart, how long to wait.
        sizes: numbers of nodes that the run can work with, ascending.
        expected: agents of the allocation, for which the first attempt waits.
        run_dir: the run's folder, for what is said.
    """

    limits: LaunchConfig
    sizes: Sequence[int]
    expected: int
    run_dir: Path


@dataclass(frozen=True)
class Told:
    """A signal that asks the run to stop; ``by_agent`` if it reached an agent of the allocation."""

    number: int
    by_agent: bool = False


@dataclass(frozen=True)
class State:
    """What the supervisor remembers from one event to the next.

    Attributes:
        rules: what stays the same.
        kind: why the next attempt begins, as in :mod:`launcher.elastic.events`; ``lost`` until its nodes are known.
        restarts, losses: counts of failures.
        signals: what asked the run to stop, oldest first.
        came: names of all nodes that ever came.
        before: names of the nodes of the last attempt.
        port_tries: attempts that ended since the port of rank 0 was taken.
    """

    rules: Rules
    kind: str
    restarts: Restarts
    losses: Losses
    signals: tuple[Told, ...] = ()
    came: frozenset[str] = frozenset()
    before: tuple[str, ...] = ()
    port_tries: int = 0


@dataclass(frozen=True)
class Candidate:
    """A node that is there, or has ranks.

    Attributes:
        name: its name.
        joined: when it came, in seconds since the epoch.
        asked: signal by which it was told to leave; 0 if it was not.
        works: whether it has ranks now.
        gone: whether it was lost since its ranks were started.
    """

    name: str
    joined: float
    asked: int = 0
    works: bool = False
    gone: bool = False


# Events.


@dataclass(frozen=True)
class Came:
    """A node has come, or was lost again before it was noticed."""

    name: str


@dataclass(frozen=True)
class Gathering:
    """No ranks run; ``nodes`` are there after ``waited`` seconds."""

    waited: float
    nodes: tuple[Candidate, ...]


@dataclass(frozen=True)
class Examined:
    """The nodes of the next attempt were checked; ``sound`` if all checks came to a good end."""

    names: tuple[str, ...]
    sound: bool
    bad: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Working:
    """Ranks run: are all of them well (``running``), and which nodes are there at time ``now``?"""

    running: bool
    lost: bool
    nodes: tuple[Candidate, ...]
    now: float


@dataclass(frozen=True)
class Halted:
    """The attempt cannot go on as it is; the first ranks to end had a moment to do so.

    Attributes:
        culprit: rank that took the others down, with its exit status.
        lost: whether a node is lost.
        asked: whether a rank ended since somebody asked it to stop.
        nodes: those that are there.
        now: seconds since the epoch.
    """

    culprit: tuple[int, int] | None
    lost: bool
    asked: bool
    nodes: tuple[Candidate, ...]
    now: float


@dataclass(frozen=True)
class AttemptEnded:
    """No rank of the attempt is left.

    Attributes:
        close: how it was ended.
        statuses: exit statuses of its ranks.
        lost: names of nodes that were lost.
        culprit: rank that took the others down, with its exit status.
        by_themselves: whether all ranks that were asked to stop have.
        port_taken: whether it failed before its first step, since somebody listens on the port of rank 0.
        run: how far the run has come.
        resume: what the next attempt resumes from.
    """

    close: Close
    statuses: tuple[int, ...]
    lost: tuple[str, ...]
    culprit: tuple[int, int] | None
    by_themselves: bool
    port_taken: bool
    run: RunState
    resume: str


@dataclass(frozen=True)
class Settled:
    """The run has stopped with ``status``, and signals had time to reach both supervisor and agents."""

    status: int
    words: str


Event = Told | Came | Gathering | Examined | Working | Halted | AttemptEnded | Settled

# Actions.


@dataclass(frozen=True)
class Wait:
    """Look again in a moment."""


@dataclass(frozen=True)
class Gather:
    """Wait for the nodes of the next attempt."""


@dataclass(frozen=True)
class Examine:
    """Check whether these nodes are fit to work together."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Start:
    """Start ranks on these nodes."""

    names: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Halt:
    """Stop watching: the attempt cannot go on as it is."""


@dataclass(frozen=True)
class Close:
    """End the ranks that are left.

    Attributes:
        stop: the whole run stops.
        change: why the ranks are to start again on other nodes.
        save: ask the ranks to save first.
        last_words: let the ranks write where they are.
    """

    stop: bool = False
    change: str | None = None
    save: bool = False
    last_words: bool = False


@dataclass(frozen=True)
class StopBetween:
    """Stop the run while no ranks are at work."""


@dataclass(frozen=True)
class Settle:
    """Wait until signals had time to reach both supervisor and agents; then report :class:`Settled`."""

    status: int
    words: str


@dataclass(frozen=True)
class Finish:
    """End the supervisor with ``status``; ``again`` says why the run is to be started again, if it is."""

    status: int
    again: str | None = None


Action = Wait | Gather | Examine | Start | Halt | Close | StopBetween | Settle | Finish


@dataclass(frozen=True)
class Decision:
    """The answer to an event.

    Attributes:
        state: what to remember.
        action: what to do next.
        blame: rank that the attempt failed by, with its exit status; explained first.
        exclude: nodes never to be used again, each with the reason.
        say: lines for people.
    """

    state: State
    action: Action = Wait()
    blame: tuple[int, int] | None = None
    exclude: tuple[tuple[str, str], ...] = ()
    say: tuple[str, ...] = ()
