"""Judge the links between nodes: which node is to blame, and which links only deserve a line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher.health.node import Problem
from megamoe.config.launch import HealthConfig

GBIT = 1e9 / 8  # bytes per second
MOST = 4  # if more than one node in so many looks slow, the network is to blame and no node


@dataclass(frozen=True)
class Links:
    """Measured links. Nodes are numbers here, in the order in which they were given to the check.

    Attributes:
        missing: nodes that did not reach the first one, or fell silent afterwards.
        unreachable: pairs that cannot connect.
        all_reduce: bytes per second and node of an all-reduce over all nodes, counted as nccl-tests do (bus bandwidth);
            0 when there was none.
        speeds: (node, node, bytes per second) of single links.
    """

    missing: list[int]
    unreachable: list[tuple[int, int]]
    all_reduce: float
    speeds: list[tuple[int, int, float]]

    def to_json(self) -> dict[str, Any]:
        """Return it as a message."""
        return asdict(self)

    @staticmethod
    def from_json(message: dict[str, Any], nodes: int) -> Links:
        """Read a message about ``nodes`` nodes.

        Raises:
            ValueError: it is not one.
        """
        try:
            links = Links(
                [int(node) for node in message["missing"]],
                [(int(one), int(other)) for one, other in message["unreachable"]],
                float(message["all_reduce"]),
                [(int(one), int(other), float(speed)) for one, other, speed in message["speeds"]],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no report about links: {error}") from None
        named = [*links.missing, *(node for pair in links.unreachable for node in pair)]
        named += [node for one, other, _ in links.speeds for node in (one, other)]
        if not all(0 <= node < nodes for node in named) or any(one == other for one, other in links.unreachable):
            raise ValueError("a report about links names nodes that are not there")
        return links


def slow_links(speeds: Collection[tuple[int, int, float]], limits: HealthConfig) -> list[tuple[int, int, float]]:
    """Return the links below launch.health.bandwidth, or launch.health.slow times slower than the upper quartile.

    The median would not do: with three nodes, one bad node is part of two of the three links.
    """
    floor = limits.bandwidth * GBIT
    if limits.slow and speeds:
        ordered = sorted(speed for _, _, speed in speeds)
        floor = max(floor, ordered[len(ordered) * 3 // 4] / limits.slow)
    return [link for link in speeds if link[2] < floor]


def link_problems(links: Links, names: Sequence[str], limits: HealthConfig) -> tuple[list[Problem], list[str]]:
    """Return the nodes that are to blame, and lines about whatever else people should know.

    A node is to blame when several of its links are bad. A single bad link may be the fault of either end: when the two
    cannot connect at all, one of them has to go, and that is the later one; when it is only slow, it is told and used.
    """
    problems = _silent(links, names)
    bad = {problem.node for problem in problems}
    for node, others in _blame([pair for pair in links.unreachable if not bad & {names[pair[0]], names[pair[1]]}], 1):
        who = ", ".join(names[other] for other in others)
        problems.append(
            Problem(
                names[node], "links", f"no connection with {who}", "every pair of nodes is needed", "look for a firewall"
            )
        )
    slow = slow_links(links.speeds, limits)
    tested = Counter(node for one, other, _ in links.speeds for node in (one, other))
    guilty = [(node, others) for node, others in _blame([(a, b) for a, b, _ in slow], 2) if 2 * len(others) > tested[node]]
    if len(guilty) > max(1, len(names) // MOST):
        guilty = []
    speeds = {frozenset(link[:2]): link[2] for link in links.speeds}
    for node, others in guilty:
        measured = ", ".join(f"{_gbit(speeds[frozenset((node, other))])} with {names[other]}" for other in others)
        best = max(speed for _, _, speed in links.speeds)
        limit = f"the best link has {_gbit(best)} ({_setting(limits)})"
        problems.append(Problem(names[node], "links", measured, limit, "look at its network card, cable and switch port"))
    blamed = {node for node, _ in guilty}
    told = [
        f"the link of {names[one]} and {names[other]} is slow: {_gbit(speed)} ({_setting(limits)})"
        for one, other, speed in slow
        if not blamed & {one, other}
    ]
    return problems, told


def _silent(links: Links, names: Sequence[str]) -> list[Problem]:
    first = names[0]
    if len(links.missing) == len(names) - 1 > 1:
        measured = "no other node reaches it"
        return [Problem(first, "rendezvous port", measured, "all have to", "look for a firewall between the nodes")]
    limit = "every node has to"
    measured = f"does not reach {first}"
    return [
        Problem(names[node], "rendezvous", measured, limit, "look for a firewall or a wrong route")
        for node in links.missing
    ]


def _blame(pairs: Sequence[tuple[int, int]], least: int) -> list[tuple[int, list[int]]]:
    """Find few nodes that explain the bad pairs: each is in ``least`` or more pairs that those before it do not explain.

    Returns:
        (node, the other ends of all its bad pairs).
    """
    found = []
    left = [frozenset(pair) for pair in pairs]
    while left:
        counts = Counter(node for pair in left for node in pair)
        worst = max(counts, key=lambda node: (counts[node], node))
        if counts[worst] < least:
            break
        found.append((worst, sorted(other for pair in pairs if worst in pair for other in pair if other != worst)))
        left = [pair for pair in left if worst not in pair]
    return found


def _gbit(speed: float) -> str:
    return f"{speed / GBIT:.3g} Gbit/s"


def _setting(limits: HealthConfig) -> str:
    return " or ".join(
        text
        for number, text in (
            (limits.slow, f"launch.health.slow {limits.slow:g}"),
            (limits.bandwidth, f"launch.health.bandwidth {limits.bandwidth:g}"),
        )
        if number
    )
