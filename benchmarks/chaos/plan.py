"""What happens in a trial: a pure function of its seed, so that a number is all it takes to see a failure again."""

from __future__ import annotations

import random
from dataclasses import dataclass

STEPS, EVERY, KEEP = 16, 4, 3
"""Steps of a run, steps between its checkpoints, checkpoints kept."""

SKIPPED = 6
"""The step that a lasting NaN hits: always the same, so that one more reference for each layout is enough."""

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1x1x1": (1, ()),
    "expert 2": (2, ("parallel.expert=2",)),
    "pipeline 2": (2, ("parallel.pipeline=2",)),
    "ZeRO-3": (2, ("parallel.zero=3",)),
    "pipeline 2 x expert 2": (4, ("parallel.pipeline=2", "parallel.expert=2")),
    "expert 2 x ZeRO-2": (4, ("parallel.expert=2", "parallel.zero=2")),
}
_SHARES = {"1x1x1": 6, "expert 2": 4, "pipeline 2": 4, "ZeRO-3": 3, "pipeline 2 x expert 2": 2, "expert 2 x ZeRO-2": 1}

KINDS = {
    "kill-rank": "SIGKILL to rank {rank}",
    "kill-all": "SIGKILL to all ranks",
    "kill-launcher": "SIGKILL to the launcher",
    "kill-rank-in-save": "SIGKILL to rank {rank}",
    "kill-all-in-save": "SIGKILL to all ranks",
    "kill-launcher-in-save": "SIGKILL to the launcher",
    "kill-worker": "SIGKILL to the data worker of rank {rank}",
    "freeze-rank": "SIGSTOP to rank {rank}",
    "freeze-worker": "SIGSTOP to the data worker of rank {rank}",
    "stop": "SIGTERM to {whom}",
    "nan-once": "one NaN in a gradient of rank {rank}",
    "nan-lasting": "NaN in a gradient of rank {rank} each time that the step is computed",
    "disk-full": "the disk of {where} fills up but for {amount:.0%} of a checkpoint",
    "cut-file": "SIGKILL to {whom}; a file of the newest checkpoint is cut to {amount:.0%}",
    "flip-bit": "SIGKILL to {whom}; a bit of a file of the newest checkpoint is flipped, {amount:.0%} into it",
}
"""The kinds of faults, and how they are told."""

_WORKER = ("kill-worker", "freeze-worker")
_DAMAGE = ("cut-file", "flip-bit")
_NAN = ("nan-once", "nan-lasting")
_IN_START = ("kill-rank", "kill-all", "kill-launcher", "stop")
_TWO_RANKS = ("kill-all", "kill-all-in-save")  # with one rank it is kill-rank


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        kind: One of ``KINDS``.
        when: ``start``: while the ranks start; ``step``: after ``step`` is recorded; ``save``: in the first save from
            ``step`` on.
        step: See ``when``; for ``start`` it only orders the faults of a trial.
        delay: Seconds after that moment.
        rank: The rank that it hits.
        whom: ``the launcher`` or ``a rank``: who gets the signal, where either may.
        where: ``the run`` or ``the checkpoints``: what lies on the disk that fills up.
        amount: A share; see ``KINDS``.
        pick: Chooses among the files of a checkpoint.
        then: The layout to go on with, if the launcher has ended; else it restarts the ranks as they were.
    """

    kind: str
    when: str
    step: int
    delay: float
    rank: int
    whom: str
    where: str
    amount: float
    pick: int
    then: str

    def words(self) -> str:
        """The fault for people."""
        what = KINDS[self.kind].format(rank=self.rank, whom=self.whom, where=self.where, amount=self.amount)
        if self.kind in _NAN:
            return f"step {self.step}: {what}"
        when = {
            "start": f"{self.delay:.1f} s into the start of the ranks",
            "step": f"{1000 * self.delay:.0f} ms after step {self.step}",
            "save": f"{1000 * self.delay:.0f} ms into the first save from step {self.step} on",
        }
        return f"{when[self.when]}: {what}{f' -> {self.then}' if self.may_end_the_launcher else ''}"

    @property
    def may_end_the_launcher(self) -> bool:
        """Whether the run may have to be launched again, and so may get another layout."""
        if self.kind in _DAMAGE:
            return self.whom == "the launcher"
        return self.kind in ("kill-launcher", "kill-launcher-in-save", "stop", "disk-full")


@dataclass(frozen=True)
class Plan:
    """A trial.

    Attributes:
        seed: What it was made from.
        layout: The layout that it starts with.
        workers: Data workers of each rank that reads data.
        faults: In the order in which they come.
    """

    seed: int
    layout: str
    workers: int
    faults: tuple[Fault, ...]

    @property
    def kinds(self) -> list[str]:
        """Of the faults, in their order."""
        return [fault.kind for fault in self.faults]

    @property
    def lasting(self) -> Fault | None:
        """The fault that leaves a step out, if it has one."""
        return next((fault for fault in self.faults if fault.kind == "nan-lasting"), None)

    def words(self) -> str:
        """The plan for people."""
        workers = ", with data workers" if self.workers else ""
        return f"{self.layout}{workers}; " + "; ".join(fault.words() for fault in self.faults)


def make_plan(seed: int) -> Plan:
    """The trial of a seed: one to three faults of different kinds, at most one of them a NaN."""
    rng = random.Random(seed)
    start = layout = rng.choices(list(_SHARES), list(_SHARES.values()))[0]
    kinds = _draw_kinds(rng, LAYOUTS[layout][0])
    steps = [
        _possible_step(kind, step) for kind, step in zip(kinds, rng.sample(range(1, STEPS - 1), len(kinds)), strict=True)
    ]
    faults = []
    for step, kind in sorted(zip(steps, kinds, strict=True)):
        fault = _draw_fault(rng, kind, step, layout)
        layout = fault.then if fault.may_end_the_launcher else layout
        faults.append(fault)
    workers = int(any(kind in _WORKER for kind in kinds) or rng.random() < 0.15)
    return Plan(seed, start, workers, tuple(faults))


def _draw_kinds(rng: random.Random, ranks: int) -> list[str]:
    possible = [kind for kind in KINDS if ranks > 1 or kind not in _TWO_RANKS]
    if ranks > 2:
        possible = [kind for kind in possible if kind not in _WORKER]  # eight processes on two cores
    chosen = rng.sample(possible, rng.choices((1, 2, 3), (10, 7, 3))[0])
    nan = [kind for kind in chosen if kind in _NAN]
    return [kind for kind in chosen if kind not in nan[1:]]


def _possible_step(kind: str, step: int) -> int:
    if kind in _DAMAGE:
        return max(step, 2 * EVERY + 1)  # the checkpoint before the newest has to be there
    if kind in _WORKER:
        return min(step, STEPS // 2)  # later on it has done all its work
    return SKIPPED if kind == "nan-lasting" else step


def _draw_fault(rng: random.Random, kind: str, step: int, layout: str) -> Fault:
    when, delay = "step", rng.uniform(0, 0.15)
    if kind.endswith("-in-save"):
        when, delay = "save", rng.uniform(0, 0.2)
    elif kind in _IN_START and rng.random() < 0.2:
        when, delay = "start", rng.uniform(0, 8)
    ranks, overrides = LAYOUTS[layout]
    # Only the first stage of a pipeline reads data.
    hit = ranks // 2 if kind in _WORKER and "parallel.pipeline=2" in overrides else ranks
    smaller = [name for name, (count, _) in LAYOUTS.items() if count < ranks]
    return Fault(
        kind=kind,
        when=when,
        step=step,
        delay=round(delay, 3),
        rank=rng.randrange(ranks) % hit,
        whom=rng.choice(("the launcher", "a rank")),
        where=rng.choice(("the run", "the checkpoints")),
        amount=round(rng.uniform(0, 0.99), 2),
        pick=rng.randrange(1000),
        then=rng.choice(smaller) if smaller and rng.random() < 0.5 else layout,
    )
