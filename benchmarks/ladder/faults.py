"""What may fail in a run on SLURM, made to happen from outside; what follows is the launcher's and SLURM's doing."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.slurm.launched import LaunchedRun

WATCHDOG = 10.0  # seconds; train.watchdog_seconds of the run
GROWING = 2.0  # seconds of a step while a node is on its way, so that steps are left when it comes


@dataclass(frozen=True)
class Recovered:
    """One way from a fault to the first new step.

    Attributes:
        fault: what was done.
        kind: why the ranks were started again, as in events.jsonl.
        seconds: from the fault to the first new step.
        cluster: how much of it SLURM took: to start the run again, or to bring a node.
        step: the first new step.
    """

    fault: str
    kind: str
    seconds: float
    cluster: float
    step: int


class Faults:
    """Strikes a run of two nodes with a spare on a bed of three.

    Args:
        run: the run; its ranks are at work.
        rng: chooses among nodes.
        pace: seconds of a step.
    """

    def __init__(self, run: LaunchedRun, rng: random.Random, pace: float) -> None:
        self._run, self._bed, self._rng, self._pace = run, run.bed, rng, pace

    def strike(self, fault: str) -> list[Recovered]:
        """Let it happen and wait until the run goes on."""
        return _ALL[fault](self, fault)

    def _rank_killed(self, fault: str) -> list[Recovered]:
        at = self._signal_rank(signal.SIGKILL)
        return [self._recovered(fault, "rank", at)]

    def _rank_frozen(self, fault: str) -> list[Recovered]:
        at = self._signal_rank(signal.SIGSTOP)
        return [self._recovered(fault, "hang", at)]

    def _with_spare(self, fault: str) -> list[Recovered]:
        self._run.until(lambda: bool(self._run.nodes("spare")), "a spare")
        lost = self._run.another()
        at = self._kill(lost)
        found = [self._recovered(fault, "spare", at)]
        self._bed.start_node(lost)
        return found

    def _without_spare(self, fault: str) -> list[Recovered]:
        """The node returns afterwards, which is one more recovery."""
        head, found, gone = self._run.head(), [], []
        if head not in self._run.nodes("working"):  # it stands by itself, and is not to die now
            gone.append(self._run.another())
            at = self._kill(gone[0])
            found.append(self._recovered("a node is lost, one stands by", "spare", at))
        for node in self._bed.nodes:
            if node not in [*self._run.nodes("working"), *gone]:
                self._bed.kill_node(node)
                gone.append(node)
        self._run.until(lambda: not self._run.nodes("spare"), "the end of the spare")
        lost = self._run.another()
        at = self._kill(lost)
        found.append(self._recovered(fault, "shrink", at))
        self._run.pace(GROWING)
        at = time.time()
        self._bed.start_node(lost)
        event = self._run.until_goes_on("grow")
        noticed = self._last_attempt()["since"]
        # Until the node has come it is SLURM's time, and its agent's to start.
        found.append(Recovered("the node returns", "grow", event["time"] - at, noticed - at, event["step"]))
        self._run.pace(self._pace)
        for node in gone:
            self._bed.start_node(node)
        return found

    def _head_killed(self, fault: str) -> list[Recovered]:
        head = self._run.head()
        at = self._kill(head)
        found = [self._recovered(fault, "host", at)]
        self._bed.start_node(head)
        return found

    def _told(self, fault: str) -> list[Recovered]:
        at = time.time()
        self._bed.run(*fault.split(), self._run.job)
        return [self._recovered(fault, "again", at)]

    def _recovered(self, fault: str, kind: str, at: float) -> Recovered:
        event = self._run.until_goes_on(kind)
        return Recovered(fault, kind, event["time"] - at, self._run.recoveries()[-1].waited, event["step"])

    def _signal_rank(self, signum: signal.Signals) -> float:
        at = time.time()
        os.kill(self._run.ranks_on(self._rng.choice(self._run.nodes("working")))[0], signum)
        return at

    def _kill(self, node: str) -> float:
        at = time.time()
        self._bed.kill_node(node)
        return at

    def _last_attempt(self) -> dict[str, Any]:
        detail: dict[str, Any] = self._run.events("attempt")[-1]["detail"]
        return detail


_ALL: dict[str, Callable[[Faults, str], list[Recovered]]] = {
    "a rank is killed": Faults._rank_killed,
    "a rank is frozen": Faults._rank_frozen,
    "a node is lost, one stands by": Faults._with_spare,
    "a node is lost, none stands by": Faults._without_spare,
    "the first node is lost": Faults._head_killed,
    "scontrol requeue": Faults._told,
    "scancel --signal=USR1": Faults._told,
    "scancel --batch --signal=USR1": Faults._told,
    "scancel --signal=TERM": Faults._told,
}
KINDS = tuple(_ALL)
"""The faults by name; those that are commands get the job. SIGTERM for the steps is how preemption begins."""


def draw(seed: int, count: int) -> list[str]:
    """``count`` faults: in rounds, each of which has every kind once, in an order of its own."""
    rng = random.Random(seed)
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += rng.sample(KINDS, len(KINDS))
    return drawn[:count]
