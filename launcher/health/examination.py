"""The supervisor's checks before an attempt: are the nodes sound, do they reach each other, and how fast?"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count

from launcher.elastic.control_server import Hub, Node
from launcher.elastic.messages import Message
from launcher.health import gpus
from launcher.health.collective import CANNOT
from launcher.health.links import GBIT, Links, link_problems
from launcher.health.node import Problem
from launcher.workers.placement import Place
from launcher.workers.rank_group import POLL
from megamoe.config.launch import LaunchConfig

MEETING = 15.0  # seconds to come to a meeting, for which nothing has to be started
LOOKING = 2 * gpus.SECONDS  # seconds for a node's check of itself, which it repeats once if it finds a problem
_numbers = count(1)


@dataclass
class Findings:
    """What the checks have found.

    Attributes:
        bad: nodes that are not to be used, and why in one line.
        told: what else people should know, a line each.
        measured: the collective was tried.
        all_reduce: bandwidth of the collective in Gbit/s; 0 if there was none.
        complete: all checks came to their end; not so when a node was lost or somebody asked to stop.
    """

    bad: list[tuple[Node, str]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    measured: bool = False
    all_reduce: float = 0.0
    complete: bool = False


def examine(hub: Hub, nodes: Sequence[Node], limits: LaunchConfig, measure: bool, stop: Callable[[], bool]) -> Findings:
    """Check ``nodes`` together.

    Args:
        hub: the control port.
        nodes: those that are to work; with ``measure`` also those that stand by.
        limits: of the run.
        measure: whether to run the collective as well.
        stop: returns whether to give up.
    """
    found = Findings()
    check = _Check(hub, nodes, stop)
    wait = min(MEETING, limits.health.seconds / 2)
    within = 3 * wait + LOOKING
    answers = check.ask("meet", "met", ranks=1, seconds=wait, within=within)
    if answers is None:
        return found
    for node in nodes:
        if node not in answers:
            problem = Problem(node.name, "agent", "gives no answer", f"within {within:g} s", "look at the node")
            found.bad.append((node, str(problem)))
        elif problems := answers[node].get("problems"):
            found.bad.append((node, "; ".join(map(str, problems))))
    first = answers.get(nodes[0], {"error": "gives no answer"})
    if first["error"]:
        found.told.append(f"the links between the nodes cannot be checked: {nodes[0].name}: {first['error']}")
    else:
        _judge({"all_reduce": 0.0, "speeds": []} | first, nodes, limits, found)
    if measure and len(nodes) > 1 and not found.bad:
        health = limits.health
        answers = check.ask(
            "measure",
            "measured",
            ranks=limits.gpus_per_node or 1,
            seconds=health.seconds,
            within=health.seconds + 5,
            slow=health.slow,
            bandwidth=health.bandwidth,
        )
        if answers is None:
            return found
        found.measured = True
        for node, answer in answers.items():
            if answer["status"] == CANNOT:
                problem = Problem(node.name, "collective", "cannot begin", "each process has to", str(answer.get("said")))
                found.bad.append((node, str(problem)))
        report = answers.get(nodes[0], {})
        if report.get("status") == 0:
            _judge(_parsed(report.get("report")), nodes, limits, found)
        elif not found.bad:
            failed = ", ".join(node.name for node in nodes if answers.get(node, {}).get("status") != 0)
            found.told.append(f"the collective between the nodes failed on {failed}: {report.get('said')}")
    found.complete = True
    return found


def _judge(report: dict[str, object], nodes: Sequence[Node], limits: LaunchConfig, found: Findings) -> None:
    try:
        links = Links.from_json(report, len(nodes))
    except ValueError as error:
        found.told.append(f"the links between the nodes are not known: {nodes[0].name} sent {error}")
        return
    problems, told = link_problems(links, [node.name for node in nodes], limits.health)
    by_name = {node.name: node for node in nodes}
    found.bad += [(by_name[problem.node], str(problem)) for problem in problems]
    found.told += told
    found.all_reduce = links.all_reduce / GBIT


def _parsed(text: object) -> dict[str, object]:
    with contextlib.suppress(ValueError, TypeError):
        if isinstance(message := json.loads(str(text)), dict):
            return message
    return {}


class _Check:
    """Asks all nodes at once."""

    def __init__(self, hub: Hub, nodes: Sequence[Node], stop: Callable[[], bool]) -> None:
        self._hub, self._nodes, self._stop = hub, nodes, stop

    def ask(
        self, verb: str, answer: str, *, ranks: int, seconds: float, within: float, **fields: object
    ) -> dict[Node, Message] | None:
        """Ask for ``verb`` with ``ranks`` processes on each node; return the answers that come in time.

        None when a node was lost meanwhile, or somebody asked to stop.
        """
        number, nodes, hub = next(_numbers), self._nodes, self._hub
        nodes[0].wire.send("port")
        port = self._wait([nodes[0]], "port", None, within)
        if not port:
            return None
        for index, node in enumerate(nodes):
            place = Place(
                index * ranks,
                ranks,
                ranks * len(nodes),
                index,
                hub.address(nodes[0]),
                int(port[nodes[0]]["port"]),
                address=hub.address(node),
            )
            node.wire.send(verb, check=number, place=asdict(place), seconds=seconds, **fields)
        return self._wait(nodes, answer, number, within)

    def _wait(self, nodes: Sequence[Node], verb: str, check: int | None, seconds: float) -> dict[Node, Message] | None:
        answers: dict[Node, Message] = {}
        deadline = time.monotonic() + seconds
        while len(answers) < len(nodes) and time.monotonic() < deadline:
            if self._stop() or any(node.gone for node in nodes):
                return None
            for node in nodes:
                for each in node.take_all():
                    if each["verb"] == verb and each.get("check") == check:
                        answers[node] = each
            self._hub.poll(POLL)
        return answers
