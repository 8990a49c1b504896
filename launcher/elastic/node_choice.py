"""Who works and who stands by: the choice among the nodes that are there, and how often one may be lost."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from launcher.elastic.control_server import Node
from launcher.workers.run_progress import RunState
from megamoe.config.launch import LaunchConfig


def choose_nodes(there: Collection[Node], before: Sequence[str], size: int) -> list[Node]:
    """``size`` of the nodes that are there, in the order of their ranks.

    Those that worked before stay, as their caches are warm; then those that came first. Neighbours by name hold
    neighbouring ranks, since sites name nodes along their racks.
    """
    chosen = sorted(there, key=lambda node: (node.name not in before, node.joined))[:size]
    return sorted(chosen, key=lambda node: natural(node.name))


def best_size(sizes: Sequence[int], there: int) -> int | None:
    """The largest number of nodes that the run can work with when so many are there."""
    return max((size for size in sizes if size <= there), default=None)


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts n9 before n10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


class Losses:
    """Counts lost nodes. None of it is the run's fault, so restarts after it do not count as restarts; but it has an end.

    A node that is lost more than ``launch.max_restarts`` times, with no checkpoint in between, is not taken again. And
    more losses in a row than there are nodes plus ``launch.max_restarts``, with no later step in between, mean that the
    run itself takes its nodes down.
    """

    def __init__(self, limits: LaunchConfig) -> None:
        self._limits = limits
        self._of_node: dict[str, int] = {}
        self._saved, self._furthest, self._in_a_row = 0, 0, 0

    def note(self, names: Collection[str], state: RunState) -> list[str]:
        """These nodes were lost in an attempt that ended at ``state``; those that are not to be taken again."""
        if state.saved > self._saved:
            self._saved, self._of_node = state.saved, {}
        if state.reached > self._furthest:
            self._furthest, self._in_a_row = state.reached, 0
        self._in_a_row += len(names)
        for name in names:
            self._of_node[name] = self._of_node.get(name, 0) + 1
        return [name for name in names if self._of_node[name] > self._limits.max_restarts]

    def stuck(self) -> str | None:
        """What to say if the run loses one node after the other and comes no further."""
        if self._in_a_row <= self._limits.nodes + self._limits.max_restarts:
            return None
        return (
            f"no progress: {self._in_a_row} nodes lost in a row with no step later than {self._furthest}; "
            f"does the run itself take them down (memory)?"
        )
