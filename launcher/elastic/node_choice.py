"""Choose which nodes work and which stand by, and count how often each is lost."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from launcher.workers.run_progress import RunState
from megamoe.config.launch import LaunchConfig


class Joined(Protocol):
    """A node, as far as the choice depends on it: its name, and when it came."""

    @property
    def name(self) -> str: ...
    @property
    def joined(self) -> float: ...


Some = TypeVar("Some", bound=Joined)


def choose_nodes(there: Collection[Some], before: Sequence[str], size: int) -> list[Some]:
    """Choose ``size`` of the nodes that are there, in the order of their ranks.

    Those that worked before stay, as their caches are warm; then those that came first. Neighbours by name hold
    neighbouring ranks, since sites name nodes along their racks.
    """
    chosen = sorted(there, key=lambda node: (node.name not in before, node.joined))[:size]
    return sorted(chosen, key=lambda node: natural(node.name))


def best_size(sizes: Sequence[int], there: int) -> int | None:
    """Return the largest number of nodes that the run can work with when so many are there; None if there is none."""
    return max((size for size in sizes if size <= there), default=None)


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts n9 before n10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


@dataclass(frozen=True)
class Losses:
    """Counts lost nodes. None of it is the run's fault, so restarts after it do not count as restarts; but it has an end.

    A node that is lost more than ``launch.max_restarts`` times, with no checkpoint in between, is not taken again. And
    more losses in a row than there are nodes plus ``launch.max_restarts``, with no later step in between, mean that the
    run itself takes its nodes down.

    Attributes:
        limits: of the run.
        of_node: losses of each node since the last new checkpoint.
        saved: step of the newest checkpoint.
        furthest: the last step that was ever reached.
        in_a_row: losses since then.
    """

    limits: LaunchConfig
    of_node: Mapping[str, int] = field(default_factory=dict)
    saved: int = 0
    furthest: int = 0
    in_a_row: int = 0

    def after(self, names: Collection[str], state: RunState) -> Losses:
        """Add the loss of these nodes in an attempt that ended at ``state``."""
        counts = {} if state.saved > self.saved else dict(self.of_node)
        for name in names:
            counts[name] = counts.get(name, 0) + 1
        in_a_row = 0 if state.reached > self.furthest else self.in_a_row
        saved, furthest = max(self.saved, state.saved), max(self.furthest, state.reached)
        return Losses(self.limits, counts, saved, furthest, in_a_row + len(names))

    def too_often(self, name: str) -> bool:
        """Return whether a node was lost too often to be taken again."""
        return self.of_node.get(name, 0) > self.limits.max_restarts

    def stuck(self) -> str | None:
        """Say that the run loses one node after the other and comes no further, if so."""
        if self.in_a_row <= self.limits.nodes + self.limits.max_restarts:
            return None
        return (
            f"no progress: {self.in_a_row} nodes lost in a row with no step later than {self.furthest}; "
            f"does the run itself take them down (memory)?"
        )
