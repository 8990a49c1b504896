"""The supervisor's rules as a table: this state and this event, that action."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.elastic.decide import COMING, PORT_TRIES, SETTLED, decide, why_again
from launcher.elastic.node_choice import Losses
from launcher.elastic.steps import (
    Action,
    AttemptEnded,
    Came,
    Candidate,
    Close,
    Examine,
    Examined,
    Finish,
    Gather,
    Gathering,
    Halt,
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
from launcher.workers.run_progress import Restarts, RunState
from megamoe.config.launch import LaunchConfig

TERM, USR1, INT = int(signal.SIGTERM), int(signal.SIGUSR1), int(signal.SIGINT)
KILLED = -int(signal.SIGKILL)
LIMITS = LaunchConfig(nodes=3, node_wait=30.0, node_timeout=15.0, max_restarts=2, max_restarts_without_progress=2)
NOW = 1000.0


def state(*signals: Told, sizes: tuple[int, ...] = (1, 2, 3), kind: str = "start", **rest: Any) -> State:
    rules = Rules(LIMITS, sizes, 3, Path("runs/one"))
    return State(rules, kind, Restarts(LIMITS), Losses(LIMITS), signals, **rest)


def nodes(*names: str, asked: str = "", work: str = "", gone: str = "", joined: float = 0.0) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(name, joined, TERM if name in asked.split() else 0, name in work.split(), name in gone.split())
        for name in names
    )


ALL_CAME = {"came": frozenset({"n1", "n2", "n3"})}
WORKED = {"before": ("n1", "n2"), **ALL_CAME}


@pytest.mark.parametrize(
    ("before", "waited", "there", "action"),
    [
        (state(), 0, nodes("n1", "n2", "n3"), Examine(("n1", "n2", "n3"))),
        (state(), 0, nodes("n1", "n2"), Wait()),  # the first attempt waits for all that it may have
        (state(), COMING - 1, nodes("n1", "n2"), Wait()),  # an agent has yet to come
        (state(), COMING, nodes("n1", "n2"), Examine(("n1", "n2"))),
        (state(**ALL_CAME), 30, nodes("n1", "n2"), Examine(("n1", "n2"))),  # all came, one is lost already
        (state(sizes=(2, 4)), COMING, nodes("n1", "n2", "n3"), Examine(("n1", "n2"))),
        (state(**WORKED), 0, nodes("n3", "n2"), Examine(("n2", "n3"))),  # as many as worked before
        (state(**WORKED), 0, nodes("n3", "n2", "n1"), Examine(("n1", "n2", "n3"))),
        (state(**WORKED), 29, nodes("n2"), Wait()),
        (state(**WORKED), 30, nodes("n2"), Examine(("n2",))),
        (state(**WORKED), 30, nodes("n1", "n2", asked="n1"), Examine(("n2",))),
        (state(**WORKED, sizes=(2,)), 29, nodes("n2"), Wait()),
        (state(**WORKED, sizes=(2,)), 30, nodes("n2"), Finish(1, "only 1 nodes are left, and the run needs 2")),
        (state(Told(TERM), **WORKED), 0, nodes("n1", "n2"), StopBetween()),
    ],
)
def test_who_works_in_the_next_attempt(before: State, waited: float, there: tuple[Candidate, ...], action: Action) -> None:
    decision = decide(before, Gathering(waited, there))
    assert decision.action == action and decision.state == before


@pytest.mark.parametrize(
    ("kind", "names", "starts_as"),
    [
        ("start", ("n1", "n2"), "start"),
        ("rank", ("n1", "n2"), "rank"),
        ("lost", ("n1",), "shrink"),
        ("lost", ("n1", "n2"), "back"),
        ("lost", ("n1", "n3"), "spare"),
        ("lost", ("n1", "n2", "n3"), "spare"),
    ],
)
def test_an_attempt_is_named_by_what_led_to_it(kind: str, names: tuple[str, ...], starts_as: str) -> None:
    decision = decide(state(kind=kind, **WORKED), Examined(names, sound=True))
    assert decision.action == Start(names, starts_as)
    assert (decision.state.before, decision.state.kind) == (names, starts_as)


def test_nodes_that_are_not_sound_are_excluded_and_others_gathered() -> None:
    before = state(kind="lost", **WORKED)
    decision = decide(before, Examined(("n1", "n2"), sound=False, bad=(("n1", "a GPU is missing"),)))
    assert decision.action == Gather() and decision.exclude == (("n1", "a GPU is missing"),)
    assert decision.state == before, "the next choice is still the answer to the loss"


@pytest.mark.parametrize(
    ("before", "running", "lost", "there", "action"),
    [
        (state(**WORKED), True, False, nodes("n1", "n2", work="n1 n2"), Wait()),
        (state(**WORKED), False, False, nodes("n1", "n2", work="n1 n2"), Halt()),
        (state(**WORKED), True, True, nodes("n1", "n2", work="n1 n2"), Halt()),
        (state(Told(TERM), **WORKED), True, False, nodes("n1", "n2", work="n1 n2"), Halt()),
        (state(**WORKED), True, False, nodes("n1", "n2", work="n1 n2", asked="n2"), Halt()),  # it is taken away
        (state(**WORKED), True, False, nodes("n1", "n2", "n3", work="n1 n2"), Halt()),  # one more can work
        (state(**WORKED), True, False, nodes("n1", "n2", "n3", work="n1 n2", asked="n3"), Wait()),
        (state(**WORKED), True, False, nodes("n1", "n2", "n3", work="n1 n2", joined=NOW - SETTLED / 2), Wait()),
        (state(sizes=(2,), **WORKED), True, False, nodes("n1", "n2", "n3", work="n1 n2"), Wait()),  # it stands by
    ],
)
def test_when_an_attempt_is_left_alone(
    before: State, running: bool, lost: bool, there: tuple[Candidate, ...], action: Action
) -> None:
    assert decide(before, Working(running, lost, there, NOW)).action == action


AT_WORK = nodes("n1", "n2", work="n1 n2")
MORE = nodes("n1", "n2", "n3", work="n1 n2")
LEAVING = nodes("n1", "n2", work="n1 n2", asked="n2")


@pytest.mark.parametrize(
    ("before", "culprit", "lost", "asked", "there", "close"),
    [
        (state(**WORKED), None, False, False, AT_WORK, Close()),  # all are done
        (state(**WORKED), (1, KILLED), False, False, AT_WORK, Close(last_words=True)),
        (state(**WORKED), None, True, False, AT_WORK, Close()),  # nobody can save without the others
        (state(Told(TERM), **WORKED), None, False, False, AT_WORK, Close(stop=True, save=True)),
        (state(Told(TERM), **WORKED), (0, 75), False, True, AT_WORK, Close(stop=True, save=True)),
        (state(**WORKED), (0, 75), False, True, AT_WORK, Close(stop=True, save=True)),  # somebody asked a rank
        (state(**WORKED), (0, 75), False, True, LEAVING, Close(change="leave", save=True)),  # its node was told so
        (state(**WORKED), None, False, False, MORE, Close(change="grow", save=True)),
        (state(**WORKED), (1, 1), False, False, MORE, Close(last_words=True)),  # a failure comes before growth
        (state(Told(TERM), **WORKED), None, True, False, AT_WORK, Close(stop=True)),
        (
            state(**WORKED),
            (0, 75),
            True,
            True,
            nodes("n1", "n2", work="n1 n2", asked="n2", gone="n2"),
            Close(change="leave"),
        ),  # the node that was taken away is gone before its ranks have saved: a loss, not the end of the run
    ],
)
def test_how_an_attempt_is_ended(
    before: State,
    culprit: tuple[int, int] | None,
    lost: bool,
    asked: bool,
    there: tuple[Candidate, ...],
    close: Close,
) -> None:
    assert decide(before, Halted(culprit, lost, asked, there, NOW)).action == close


def ended(*statuses: int, **rest: Any) -> AttemptEnded:
    culprit = next(((rank, status) for rank, status in enumerate(statuses) if status), None)
    fields: dict[str, Any] = {
        "close": Close(),
        "lost": (),
        "culprit": culprit,
        "by_themselves": False,
        "port_taken": False,
        "run": RunState(7, 5, Path("step-5")),
        "resume": "auto",
    }
    return AttemptEnded(statuses=statuses, **fields | rest)


STOP = Close(stop=True, save=True)


@pytest.mark.parametrize(
    ("event", "action", "kind", "said"),
    [
        (ended(0, 0), Finish(0), "start", ""),
        (ended(0, KILLED), Gather(), "rank", "restart 1 of at most 2 since the last checkpoint: all 2 ranks with"),
        (ended(76, 0), Gather(), "hang", "restart 1 of at most 2"),
        (ended(0, 2), Finish(2), "rank", ""),
        (ended(1, 0, port_taken=True), Gather(), "port", "somebody took the port of rank 0"),
        (ended(KILLED, 0, lost=("n1",)), Gather(), "lost", ""),
        (ended(75, 75, close=Close(change="grow", save=True), by_themselves=True), Gather(), "grow", ""),
        (ended(75, 143, close=Close(change="leave", save=True)), Gather(), "leave", "not all ranks have saved in time"),
        (ended(75, 75, close=STOP, by_themselves=True), Settle(75, "stopped and saved at step 5"), "start", ""),
        (ended(0, 0, close=STOP, by_themselves=True), Finish(0), "start", ""),
        (
            ended(75, KILLED, close=STOP),
            Settle(143, "stopped at step 7 without a save; the last checkpoint is of step 5"),
            "start",
            "",
        ),
        (ended(75, KILLED, close=STOP, lost=("n2",), by_themselves=True, run=RunState(5, 5, None)), None, "start", ""),
    ],
)
def test_what_follows_an_attempt(event: AttemptEnded, action: Action | None, kind: str, said: str) -> None:
    decision = decide(state(**WORKED), event)
    assert decision.action == (action or Settle(75, "stopped and saved at step 5"))
    assert decision.state.kind == kind
    assert "".join(decision.say).startswith(said) and bool(said) == bool(decision.say)
    blamed = kind in ("rank", "hang", "port")
    assert decision.blame == (event.culprit if blamed else None)


def test_a_port_is_tried_so_often_and_then_counts_as_a_failure() -> None:
    now = state(**WORKED)
    for _ in range(PORT_TRIES):
        now = decide(now, ended(1, 0, port_taken=True)).state
    assert now.restarts.count == 0
    decision = decide(now, ended(1, 0, port_taken=True))
    assert decision.state.kind == "rank" and decision.state.restarts.count == 1


def test_restarts_have_an_end() -> None:
    now, reached = state(**WORKED), 7
    for count in (1, 2):
        decision = decide(now, ended(1, 0, run=RunState(reached, 0, None)))
        now, reached = decision.state, reached + 1
        assert decision.action == Gather() and now.restarts.count == count
    decision = decide(now, ended(1, 0, run=RunState(reached, 0, None)))
    assert decision.action == Finish(1) and "giving up after 2 restarts" in decision.say[0]
    decision = decide(now, ended(1, 0, run=RunState(reached, 5, None)))
    assert decision.action == Gather() and decision.state.restarts.count == 1, "a checkpoint makes the count begin anew"


def test_restarts_without_progress_end_with_a_status_of_their_own() -> None:
    now = state(**WORKED)
    for _ in range(2):
        now = decide(now, ended(1, 0)).state
    decision = decide(now, ended(76, 0))
    assert decision.action == Finish(77)
    ends = "rank 0 ended with status 1, then rank 0 ended with status 1, then rank 0 ended with status 76"
    assert f"came no further than step 7 ({ends}); the logs are in runs/one/logs" in decision.say[0]


def test_a_node_that_is_lost_again_and_again_is_excluded_and_all_losses_have_an_end() -> None:
    now = state(**WORKED)
    for _ in range(2):
        decision = decide(now, ended(KILLED, 0, lost=("n1",)))
        now = decision.state
        assert decision.exclude == () and decision.action == Gather()
    decision = decide(now, ended(KILLED, 0, lost=("n1",)))
    assert decision.exclude == (("n1", "lost 3 times since the last checkpoint"),) and decision.action == Gather()
    decision = decide(decision.state, ended(KILLED, 0, lost=("n2", "n3", "n4")))
    assert decision.action == Finish(77) and "6 nodes lost in a row" in decision.say[0]
    assert decision.state.restarts.count == 0, "no rank is to blame"


@pytest.mark.parametrize(
    ("signals", "again"),
    [
        ([], None),
        ([Told(TERM)], None),
        ([Told(TERM, True)], "SIGTERM for the nodes alone (preemption)"),
        ([Told(TERM, True), Told(TERM)], None),
        ([Told(USR1)], "SIGUSR1"),
        ([Told(USR1, True)], "SIGUSR1"),
        ([Told(USR1, True), Told(TERM)], "SIGUSR1"),
        ([Told(USR1), Told(INT)], None),
        ([Told(INT, True)], None),
    ],
)
def test_a_stop_is_for_good_unless_it_was_a_time_limit_or_preemption(signals: list[Told], again: str | None) -> None:
    assert why_again(signals) == again
    decision = decide(state(*signals), Settled(75, "stopped"))
    assert decision.action == Finish(75, again)
    go_on = "; go on with: megamoe launch resume runs/one"
    assert decision.say == ("stopped" if again else f"stopped{go_on}",)


def test_what_is_only_remembered() -> None:
    now = decide(state(), Told(TERM, by_agent=True)).state
    now = decide(now, Told(USR1)).state
    now = decide(now, Came("n1")).state
    assert now == replace(state(), signals=(Told(TERM, True), Told(USR1)), came=frozenset({"n1"}))
